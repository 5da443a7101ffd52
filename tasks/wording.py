"""The sentences of the city-number needle tasks, and the cities they speak of."""

INTRODUCTION = (
    "Below is a collection of notes. Among them, a sentence states the special number of a city. "
    "Read every note; a question about a special number follows at the end.\n\n"
)
NEEDLE = "The special number of {city} is {number}."
# Each question ends with the beginning of its answer.
ANSWER = "Answer: The special number of {city} is"
QUESTION = "\n\nQuestion: What is the special number of {city}?\n" + ANSWER
# Numbers have this many digits, the first of them not 0.
NUMBER_DIGITS = 5

CITIES = """Amsterdam Ankara Athens Auckland Baghdad Bangkok Barcelona Beijing Belgrade Berlin
Bogota Boston Brussels Budapest Cairo Caracas Chicago Copenhagen Dakar Damascus Delhi Dhaka Dublin
Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Johannesburg Karachi Kinshasa Lagos Lima
Lisbon London Madrid Manila Melbourne Milan Montreal Moscow Mumbai Munich Nairobi Oslo Paris Prague
Quito Rome Santiago Seoul Shanghai Singapore Stockholm Sydney Tehran Tokyo Toronto Tunis Vienna
Warsaw Zurich""".split()

# The passkey prompt of "Landmark Attention", arXiv:2305.16300, which later papers have kept.
PASSKEY_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
PASSKEY_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
PASSKEY_NEEDLE = "The pass key is {number}. Remember it. {number} is the pass key."
PASSKEY_ANSWER = "The pass key is"
PASSKEY_QUESTION = "\nWhat is the pass key? " + PASSKEY_ANSWER
