"""`fewstep import`: brings in models that are stored in other formats."""

from pathlib import Path

from fewstep.commands.places import check_writable
from fewstep.errors import UserError
from fewstep.files import written_folder
from fewstep.models.loading.edm_checkpoint import convert, read_network
from fewstep.runtime.tracking import progress_bar


def import_edm(path: Path, out: Path) -> None:
    """Writes the network of an EDM checkpoint as the model folder `out`, whole or not at all; prints what it is."""
    check_writable(out)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out")
    config, tensors = read_network(path)
    classes = f"{config.num_classes:,} classes" if config.num_classes else "no classes"
    print(f"{path}: EDM, an ADM network, {config.image_size}x{config.image_size}x{config.channels}, {classes}")
    with progress_bar("import", len(tensors)) as show:
        model = convert(config, tensors, show)
    with written_folder(out) as temporary:
        model.save(temporary)
    print(f"wrote {out}: {sum(p.numel() for p in model.network.parameters()):,} parameters")
