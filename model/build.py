"""One of the architectures, with initial weights."""

from onetrain.model.decoder import SidDecoder
from onetrain.model.decoder_only import DecoderOnly
from onetrain.model.lazy_decoder import LazyDecoder
from onetrain.model.options import ModelOptions, Vocabulary


def build(options: ModelOptions, vocabulary: Vocabulary) -> SidDecoder:
    """The network that `options.architecture` names.

    Raises ValueError for a feature that the vocabulary lacks, or an unbounded one that is not hashed.
    """
    if options.architecture == "decoder_only":
        return DecoderOnly(options, vocabulary)
    return LazyDecoder(options, vocabulary)
