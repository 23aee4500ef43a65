"""Words that several settings and functions choose from."""

from typing import Literal

Overlong = Literal["drop", "truncate", "raise"]
OnBadRecord = Literal["raise", "skip", "warn"]

Dtype = Literal["auto", "float32", "bfloat16"]
ParamDtype = Literal["float32", "bfloat16"]
BaseDtype = Literal["auto", "int8"]
"""How the frozen models of a training are held: in the dtype of products, or in int8."""
Remat = Literal["none", "layers", "all"]
"""What the learner keeps of each layer for the gradient: all that it needs, products with kernels, or its input."""

TruncationSide = Literal["left", "right"]
"""Where a text that is too long is cut: "right" keeps its first tokens, "left" its last."""
