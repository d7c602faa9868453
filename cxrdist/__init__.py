"""cxrdist: chest X-ray models, from images to a model in use; `cxrdist.load` gives a trained one for Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cxrdist.inference.predictor import Prediction, Predictor, load

__all__ = ["Prediction", "Predictor", "__version__", "load"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is first used."""
    if name in ("Prediction", "Predictor", "load"):
        from cxrdist.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module 'cxrdist' has no attribute {name!r}")
