import jax
from jax.sharding import PartitionSpec as P

from shampax.framework.reporting import startup
from shampax.framework.sharding.placement import Placement


def test_table_shows_each_parameter_and_the_total():
    params = {
        "embed": jax.ShapeDtypeStruct((32, 6), "float32"),
        "norm": {"scale": jax.ShapeDtypeStruct((), "float32")},
    }
    placements = {
        "params/embed": Placement(P(None, "fsdp"), ("vocab: 32 not divisible by 5 (tensor)",)),
        "params/norm/scale": Placement(P()),
    }
    text = startup.table(startup.parameter_rows(params, placements, {"embed": "shampoo 32x6 x1"}))
    header, embed, scale, total = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in (header, embed, scale, total)]
    assert cells == [
        ["parameter", "shape", "sharding", "treatment", "count"],
        ["embed", "32x6", "-,fsdp (vocab: 32 not divisible by 5 (tensor))", "shampoo 32x6 x1", "192"],
        ["norm/scale", "scalar", "replicated", "-", "1"],
        ["total", "193"],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_many_parameters_are_shortened_on_the_console_and_complete_in_the_file(tmp_path, capsys):
    rows = [startup.Row(f"layer_{i}/w", "4x4", "replicated", "-", i) for i in range(100)]
    startup.show_parameters(rows, tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + 40 + 1 + 1
    assert [line.split()[0] for line in (shown[1], shown[40])] == ["layer_60/w", "layer_99/w"]
    assert "(60 more in parameters.txt)" in shown[-2]
    assert shown[-1].split() == ["total", f"{99 * 50:,}"]
    written = (tmp_path / "parameters.txt").read_text().splitlines()
    assert len(written) == 102
    assert shown[-1].split() == written[-1].split()
