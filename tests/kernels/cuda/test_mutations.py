"""The seeded bugs still fit the source; `make mutate-kernels` tries them."""

from pathlib import Path

from kernels.cuda.variant import FOLDER
from tests.kernels.cuda.mutate import mutate, read_mutations


def test_each_changes_one_file(tmp_path: Path) -> None:
    for i, mutation in enumerate(read_mutations()):
        folder = tmp_path / str(i)
        mutate(mutation, folder)
        changed = [path.name for path in folder.glob("*.cu*") if path.read_text() != (FOLDER / path.name).read_text()]
        assert changed == [mutation.file]


def test_names_differ() -> None:
    mutations = read_mutations()
    assert len({(mutation.file, mutation.name) for mutation in mutations}) == len(mutations) > 80
