"""Figures: the numbers they draw, the words beside them, and that no two words overlap, at any size of model."""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from numpy.testing import assert_allclose

from minimoe.core.errors import UserError
from minimoe.draw import palette, plots


def run_of(steps, layers=2, experts=8, seed=0):
    """The metrics of an invented run: a falling loss, loads that wander, a validation loss every tenth of it."""
    rng = np.random.default_rng(seed)
    logits = np.cumsum(0.03 * rng.standard_normal((steps, layers, experts)), axis=0)
    load = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = []
    for step in range(1, steps + 1):
        loss = 1.5 + 3 * np.exp(-6 * step / steps) + 0.05 * rng.standard_normal()
        row = {
            "step": step,
            "tokens": 2048 * step,
            "loss": loss,
            "auxiliary": {"balance": [1.1, 1.3], "importance": [0.1] * 2, "load": [0.0] * 2, "z": [4.0] * 2},
            "load": load[step - 1].tolist(),
        }
        rows.append(row | ({"val_loss": loss + 0.1} if step % max(1, steps // 10) == 0 else {}))
    return rows


def domains(count, layers=2, experts=8):
    rng = np.random.default_rng(1)
    return {f"domain {n}": rng.dirichlet(20 * np.ones(experts), layers) for n in range(count)}


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def curves(axes):
    """The lines of a panel of shares, without the three guides, which span the panel from 0 to 1."""
    return [line for line in axes.get_lines() if list(line.get_xdata()) != [0, 1]]


def guides(axes):
    return sorted(line.get_ydata()[0] for line in axes.get_lines() if list(line.get_xdata()) == [0, 1])


def test_loss_is_drawn_over_the_tokens_seen_in_nats():
    rows = run_of(100)
    top, bottom = plots.loss_curves(rows).axes
    raw = top.get_lines()[0]
    assert_allclose(raw.get_xdata(), [row["tokens"] for row in rows])
    assert_allclose(raw.get_ydata(), [row["loss"] for row in rows])
    training, validation = top.get_lines()[1:]
    assert_allclose(training.get_ydata(), plots.smooth(np.array([row["loss"] for row in rows])))
    assert_allclose(validation.get_xydata(), [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row])
    assert f"{rows[-1]['val_loss']:.2f}" in validation.get_label()
    assert "nats per token" in top.get_ylabel()
    assert bottom.get_xlabel() == "tokens seen"


def test_auxiliary_losses_are_means_of_the_layers():
    _, bottom = plots.loss_curves(run_of(5)).axes
    assert {name: line.get_ydata()[0] for name, line in labelled(bottom).items()} == pytest.approx(
        {"balance": 1.2, "importance": 0.1, "load": 0.0, "z": 4.0}
    )


def test_a_dense_run_has_no_auxiliary_losses_to_draw():
    (top,) = plots.loss_curves(run_of(100, experts=1)).axes
    assert top.get_xlabel() == "tokens seen"


def test_no_share_beyond_the_whole_is_drawn_or_marked():
    for axes in plots.load_over_time(run_of(20, experts=2)).axes:
        assert guides(axes) == [0.25, 0.5]
        assert axes.get_ylim()[1] <= 1.02


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_names_of_many_long_texts_stay_on_the_sheet(layers):
    names = [f"the_{n}_of_{n}_books_with_a_long_name.txt" for n in range(9)]
    loads = dict(zip(names, domains(9, layers, 32).values(), strict=True))
    figure = plots.experts(run_of(3, layers, 32), loads)
    FigureCanvasAgg(figure).draw()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    shown = [text.get_text() for text in figure.legends[1].get_texts()]
    assert len(set(shown)) == 9 and max(map(len, shown)) == 28


def test_the_steps_of_a_short_run_are_whole():
    for steps in (1, 2):
        for axes in plots.load_over_time(run_of(steps)).axes:
            assert all(tick == int(tick) for tick in axes.get_xticks())


def test_a_run_without_validation_is_drawn_too():
    rows = [{name: value for name, value in row.items() if name != "val_loss"} for row in run_of(10)]
    assert len(labelled(plots.loss_curves(rows).axes[0])) == 1


def test_smoothing_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).standard_normal(300)
    means = [values[max(0, i - 3) : i + 4].mean() for i in range(300)]  # a hundredth of 300 on either side
    assert_allclose(plots.smooth(values), means)
    assert_allclose(plots.smooth(values[:40]), values[:40])  # too short to smooth


def test_one_broken_value_does_not_erase_the_curve():
    values = np.ones(1000)
    values[500] = np.nan
    assert np.isnan(plots.smooth(values)).sum() == 21


def test_load_over_time_has_a_panel_a_layer_and_a_colour_an_expert():
    rows = run_of(30, layers=3, experts=9)
    panels = plots.load_over_time(rows).axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 1", "layer 2"]
    for layer, axes in enumerate(panels):
        assert_allclose(guides(axes), [1 / 18, 1 / 9, 2 / 9])
        for expert, line in enumerate(curves(axes)):
            assert_allclose(line.get_xdata(), range(1, 31))
            assert_allclose(line.get_ydata(), [row["load"][layer][expert] for row in rows])
            assert to_hex(line.get_color()).upper() == palette.colour(expert)
        assert curves(axes)[8].get_linestyle() != curves(axes)[0].get_linestyle()
    assert [[text.get_text() for text in axes.texts] for axes in panels] == [[], [], ["half", "fair", "double"]]


def test_a_long_run_is_drawn_as_means_of_steps_in_a_row():
    rows = run_of(202)
    line = curves(plots.load_over_time(rows).axes[1])[3]
    parts = [range(start, min(start + 4, 202)) for start in range(0, 202, 4)]  # the fewest that make 60 points or less
    assert_allclose(line.get_xdata(), [np.mean([rows[i]["step"] for i in part]) for part in parts])
    assert_allclose(line.get_ydata(), [np.mean([rows[i]["load"][1][3] for i in part]) for part in parts])


def test_of_a_deep_model_four_layers_are_drawn():
    panels = plots.load_over_time(run_of(5, layers=32)).axes
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 10", "layer 21", "layer 31"]
    line = curves(panels[2])[0]
    assert_allclose(line.get_ydata(), [row["load"][21][0] for row in run_of(5, layers=32)])


def test_bars_are_the_load_of_each_domain():
    loads = domains(3)
    figure = plots.experts(run_of(20), loads)
    below = figure.axes[2:]
    for layer, axes in enumerate(below):
        for bars, (name, load) in zip(axes.containers, loads.items(), strict=True):
            assert bars.get_label() == name
            assert_allclose([bar.get_height() for bar in bars], load[layer])
            assert [round(bar.get_x() + bar.get_width() / 2) for bar in bars] == list(range(8))
        assert guides(axes) == [1 / 8]
        assert len({to_hex(bars[0].get_facecolor()) for bars in axes.containers}) == 3
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bars in below[0].containers for bar in bars)
    assert all(right <= left + 1e-9 for (_, right), (left, _) in itertools.pairwise(edges))


def test_collapse_counts_the_experts_that_end_below_half():
    balanced, collapsed = run_of(20), run_of(20)
    for row in balanced:
        row["load"] = [[1 / 8] * 8] * 2
    for row in collapsed:
        row["load"] = [[0.5, 0.5] + [0.0] * 6, [1 / 8] * 8]
    for row in balanced[:15]:  # what happened earlier does not count
        row["load"] = [[1.0] + [0.0] * 7] * 2
    figure = plots.collapse(balanced, collapsed)
    assert [axes.get_title() for axes in figure.axes] == [
        "layer 0: 0 of 8 experts end below half",
        "layer 0: 6 of 8 experts end below half",
        "layer 1: 0 of 8 experts end below half",
        "layer 1: 0 of 8 experts end below half",
    ]
    with_losses, without = figure.axes[:2]
    assert with_losses.texts[-1].get_text() == "with auxiliary losses"
    assert without.texts[-1].get_text() == "without auxiliary losses"
    assert_allclose(curves(without)[0].get_ydata(), 0.5)


def test_the_map_of_load_shows_multiples_of_the_fair_share():
    axes = plots.expert_load(np.array([[0.5, 0.25, 0.125, 0.125], [0.25] * 4])).axes[0]
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == ["2.00", "1.00", "0.50", "0.50"] + ["1.00"] * 4
    (image,) = axes.get_images()
    assert to_hex(image.to_rgba(1.0)) == "#ffffff"
    assert to_hex(image.to_rgba(0.0)).upper() == palette.COLOURS[0]
    assert to_hex(image.to_rgba(3.5)).upper() == palette.COLOURS[5]
    for text, value in zip(axes.texts, [2, 1, 0.5, 0.5, 1, 1, 1, 1], strict=True):
        assert palette.contrast(text.get_color(), to_hex(image.to_rgba(float(value)))) > 4.5


def test_there_must_be_something_to_draw():
    for function in (plots.loss_curves, plots.load_over_time):
        with pytest.raises(UserError, match="no metrics"):
            function([])
    with pytest.raises(UserError, match="no metrics"):
        plots.collapse(run_of(2), [])
    with pytest.raises(UserError, match="no domain"):
        plots.experts(run_of(2), {})
    for load in (np.ones(8) / 8, np.ones((2, 8))):
        with pytest.raises(UserError, match="rows that sum to 1"):
            plots.expert_load(load)


def words(figure, monkeypatch):
    """Every text that is really drawn, with its rectangle in pixels."""
    drawn = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), draw(self, renderer)))
    FigureCanvasAgg(figure).draw()
    return [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_visible() and text.get_text()]


FIGURES = {
    "loss_curves": lambda rows, loads: plots.loss_curves(rows),
    "load_over_time": lambda rows, loads: plots.load_over_time(rows),
    "experts": lambda rows, loads: plots.experts(rows, loads),
    "collapse": lambda rows, loads: plots.collapse(rows, rows),
    "expert_load": lambda rows, loads: plots.expert_load(np.array(rows[-1]["load"])),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize(
    ("layers", "experts", "steps", "count"), [(1, 2, 1, 1), (1, 8, 90, 3), (4, 8, 300, 4), (70, 70, 3, 2)]
)
def test_no_words_overlap_or_leave_the_figure(name, layers, experts, steps, count, monkeypatch):
    figure = FIGURES[name](run_of(steps, layers, experts), domains(count, layers, experts))
    drawn = words(figure, monkeypatch)
    assert len(drawn) > 10
    overlapping = [
        (one, other)
        for (one, here), (other, there) in itertools.combinations(drawn, 2)
        if here.padded(1).overlaps(there)
    ]
    assert overlapping == []
    sheet = figure.bbox.padded(1)
    assert [text for text, box in drawn if not (sheet.contains(*box.min) and sheet.contains(*box.max))] == []


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_texts_are_shown_as_they_are(tmp_path, monkeypatch):
    """Dollars would set mathematics, an underscore would leave the legend, and a new line would start another one."""
    names = ["_hidden", r"$\frac$", "5$ or 6$", "\x1b[2J\n", "日本"]
    figure = plots.experts(run_of(3), dict(zip(names, domains(5).values(), strict=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save(figure, tmp_path / "figure.svg")  # and a font without these letters is no reason for a warning
    drawn = [text for text, _ in words(figure, monkeypatch)]
    assert {" _hidden", r"\$\frac\$", r"5\$ or 6\$", r"\x1b[2J ", "日本"} <= set(drawn)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_saved_figure_has_the_format_of_its_ending(tmp_path, ending):
    path = tmp_path / f"figure.{ending}"
    plots.save(plots.load_over_time(run_of(3)), path)
    beginning = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(beginning)
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_figure_replaces_the_old_file_at_once(tmp_path):
    path, other = tmp_path / "figure.png", tmp_path / "other"
    path.write_bytes(b"old")
    other.hardlink_to(path)
    plots.save(plots.load_over_time(run_of(3)), path)
    assert other.read_bytes() == b"old"  # written over byte by byte, the two names would still be one file


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure = plots.load_over_time(run_of(3))

    def half(file, **_):
        file.write(b"half")
        raise MemoryError

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(MemoryError):
        plots.save(figure, path)
    assert path.read_bytes() == b"old"


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"figure\.gif"):
        plots.save(plots.load_over_time(run_of(3)), tmp_path / "figure.gif")


def test_matplotlib_waits_until_it_is_needed_and_pyplot_is_never_needed():
    program = """
import sys
import warnings
from minimoe.analysis import coloured_text, routing_trace
from minimoe.draw import figure_parts, plots
assert "matplotlib" not in sys.modules
plots.load_over_time([{"step": 1, "load": [[0.5, 0.5]]}])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_collapsed_load_is_inside_its_panel_and_said_to_be_beyond_the_colours():
    load = [[0.9] + [0.1 / 7] * 7]
    (axes,) = plots.load_over_time([{"step": step, "load": load} for step in (1, 2)]).axes
    assert axes.get_ylim()[1] > 0.9
    for shown, extend in ((load, "max"), (np.full((1, 8), 0.125), "neither")):
        assert plots.expert_load(np.array(shown)).axes[1]._colorbar.extend == extend
