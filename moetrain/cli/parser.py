"""The parser of commands that refuse in one sentence."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises where argparse would exit, so that a refusal is reported like every other."""

    def error(self, message: str) -> NoReturn:
        """Raise ``ValueError`` with the message and where help is."""
        raise ValueError(f"{message}; see {self.prog} --help")
