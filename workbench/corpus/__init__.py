"""The built-in corpus: facts to edit, plain sentences and a gallery of example edits."""

from .edits import SENTENCES, Relation, facts, relations
from .gallery import EXAMPLES

__all__ = ["EXAMPLES", "SENTENCES", "Relation", "facts", "relations"]
