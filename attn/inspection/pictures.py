"""Pictures: attention maps as a grid of heads, and accuracy against length."""

from matplotlib.figure import Figure

from attn.inspection.capture import Maps
from attn.training.evaluation import Metrics
from attn.viewer import static_pictures
from attn.viewer.static_pictures import save as save


def draw_maps(maps: Maps, title: str) -> Figure:
    """Draw the attention of every layer and head; see `attn.viewer.static_pictures.draw`.

    A row is the token that the model wrote (in an encoder: represented), a column a token that it could attend to. For
    a model without attention the map is the influence of each source token, relative to the greatest in the row.
    """
    return static_pictures.draw(maps.kinds(), title)


def draw_lengths(metrics: Metrics, trained: tuple[int, int], title: str) -> Figure:
    """Draw exact match and token accuracy against length, with the lengths of training shaded."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    rows = list(metrics.by_length())
    lengths = [length for length, _ in rows]
    ax.axvspan(trained[0] - 0.5, trained[1] + 0.5, color="0.92", label="trained lengths")
    ax.plot(lengths, [row.token_accuracy.value() for _, row in rows], ".-", color="tab:orange", label="token accuracy")
    ax.plot(lengths, [row.exact_match.value() for _, row in rows], ".-", color="tab:blue", label="exact match")
    ax.set(xlabel="length of the source (symbols)", ylabel="share", ylim=(-0.03, 1.03))
    ax.set_title(title, parse_math=False)
    ax.legend(loc="lower left", fontsize=8)
    return figure
