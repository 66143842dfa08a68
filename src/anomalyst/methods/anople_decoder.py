"""AnoPLe's decoder. The paper says no more than that it is light: the form is our choice."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

_DECODED = 128  # channels inside


class Decoder(nn.Module):
    """Patch tokens ``[R, D, h, w]`` to features ``[R, D, 4 h, 4 w]`` of the same space.

    At the start the tokens themselves make up most of them: the skip begins as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.ConvTranspose2d(width, _DECODED, 2, stride=2),
            nn.GroupNorm(8, _DECODED),
            nn.GELU(),
            nn.ConvTranspose2d(_DECODED, _DECODED, 2, stride=2),
            nn.GroupNorm(8, _DECODED),
            nn.GELU(),
            nn.Conv2d(_DECODED, width, 1),
        )
        self.skip = nn.Conv2d(width, width, 1, bias=False)
        nn.init.dirac_(self.skip.weight)

    def forward(self, patches: Tensor) -> Tensor:
        fine: Tensor = self.fine(patches)
        coarse = functional.interpolate(
            self.skip(patches), fine.shape[-2:], mode="bilinear", align_corners=False
        )
        return fine + coarse
