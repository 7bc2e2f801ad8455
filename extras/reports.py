"""What a run tells tensorboard or wandb (--report_to)."""
import dataclasses
from pathlib import Path

from config import UserError
from engine import one_line


def reporter(config, out, start_step):
    """A function of (numbers by name, step) that passes them to config.report_to. UserError: it is not
    installed, or does not start."""
    try:
        if config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out, purge_step=start_step + 1)       # a kill may have left later steps
            return lambda numbers, step: [board.add_scalar(*number, step) for number in numbers.items()]
        import wandb                # the project is $WANDB_PROJECT
        settings, path = dataclasses.asdict(config), Path(out) / "wandb-id"
        if not path.is_file():                                          # a resumed run continues its curves
            path.write_text(wandb.util.generate_id())
        return wandb.init(name=config.recipe, config=settings, dir=out, id=path.read_text(),
                          resume="allow").log
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install it, or omit --report_to") from error
    except Exception as error:          # no login, no network
        raise UserError(f"{config.report_to} does not start ({one_line(error)}): omit --report_to") from error
