"""Images to patch rows, and the linear embedding in which filters live."""

from convcvx.patches.embedding import PatchEmbedding
from convcvx.patches.moments import Moments, provisional_mean, shifted_moment
from convcvx.patches.spec import PatchSpec

__all__ = ["Moments", "PatchEmbedding", "PatchSpec", "provisional_mean", "shifted_moment"]
