"""lm-eval tasks of yoco-eval: YAML files and the functions that build their documents."""
