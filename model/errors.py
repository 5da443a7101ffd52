"""What is raised for a checkpoint that cannot be used."""

from yoco_eval.printable import message


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and the mend, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(message(text))
