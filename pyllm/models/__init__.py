"""Model families. Each is one short file; a row in `FAMILIES` makes it known."""

from pyllm.models import config as configs
from pyllm.models import llama
from pyllm.models.config import DecoderConfig, ModelError
from pyllm.models.weights import Weights

__all__ = ["DecoderConfig", "ModelError", "build", "describe"]

# (module with ARCHITECTURES, NAMES and OPTIONAL, class)
FAMILIES = [(llama, llama.Llama)]


def build(
    checkpoint, *, quantize=None, head_bits=None, progress=None, device="cpu", dtype=None
):  # fmt: skip
    """The model of a checkpoint, its weights loaded and packed.

    Args:
        checkpoint: from `pyllm.loading.open_checkpoint`.
        quantize: None, ``"int8"`` or ``"int4"``: round unquantized matrices.
        head_bits: None, 4 or 8: round the output head.
        progress: called with ``(bytes done, bytes in all)`` after each matrix.
        device, dtype: where the weights go, and what the model computes in; see `Weights`.

    Raises:
        ModelError: if the architecture or one of its options is not supported, or a tensor is
            missing or of the wrong shape.
    """
    family, model = _family(checkpoint)
    config = describe(checkpoint)
    weights = Weights(checkpoint, family, quantize, head_bits, progress, device, dtype)
    return model(config, weights).eval()


def describe(checkpoint) -> DecoderConfig:
    """The sizes of a checkpoint's model, from its metadata alone."""
    _family(checkpoint)
    if checkpoint.format == "gguf":
        return configs.from_gguf(checkpoint.metadata, checkpoint.architecture, checkpoint.tensors)
    return configs.from_huggingface(checkpoint.metadata)


def _family(checkpoint):
    known = []
    for family, model in FAMILIES:
        if checkpoint.architecture in family.ARCHITECTURES:
            return family, model
        known += family.ARCHITECTURES
    raise ModelError(
        f"architecture: expected one of {', '.join(known)}, got {checkpoint.architecture!r}"
    )
