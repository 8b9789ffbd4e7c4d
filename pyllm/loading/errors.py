class LoadError(ValueError):
    """A checkpoint, tokenizer or model name that cannot be loaded.

    The message names the file (or the model), what was expected there and what came.
    """

    def __init__(self, path, problem):
        super().__init__(f"{path}: {problem}")
        self.path = path
