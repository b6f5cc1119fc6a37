"""For large machines, a first reader may skip it: several processes, too little memory."""

import contextlib
import datetime
import os
import sys

import torch

from parts.files import UserError


def pick_device(device):
    """auto → cuda where there is one, else cpu; any other name stays, if torch knows it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no such device here ({str(error).splitlines()[0]}) · --device {device} · "
                        "pass cpu, or a device that torch finds") from None
    return device


def with_fewer_tokens(compute, backbone):
    """compute(); where memory runs out, again with half as many tokens a forward pass."""
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError:
            if backbone.budget <= 64:
                raise UserError("out of memory even with one text a forward pass · --max-length, "
                                "--dtype · shorter texts, a "
                                "smaller model, bfloat16 or --device-map auto") from None
        backbone.budget //= 2  # outside of `except`: there the failed pass is still held
        torch.cuda.empty_cache()
        print(f"note: out of memory, going on with {backbone.budget} tokens a forward pass")


@contextlib.contextmanager
def one_thread():
    """Many small products: two threads gain little on idle cores, and lose tenfold on busy ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- several processes (torchrun)

@contextlib.contextmanager
def processes():
    """Give (rank, number of processes); under torchrun only rank 0 prints."""
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        yield rank, ranks
        return
    patience = datetime.timedelta(days=30)      # a fast process may wait long for the slowest
    torch.distributed.init_process_group("gloo", timeout=patience)
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere if rank else sys.stdout):
            yield rank, ranks
    torch.distributed.destroy_process_group()


def device_of_rank(args, ranks):
    """--device of this process: under torchrun each has a GPU of its own."""
    if ranks == 1:
        return args.device
    if args.device_map:
        raise UserError("several processes, each with a model over several devices · --device-map "
                        "· leave it out under torchrun")
    if args.device == "auto" and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return args.device


def wait_for_all(ranks):
    """A barrier under torchrun; ends quietly where another process has failed and said why."""
    if ranks > 1:
        try:
            torch.distributed.barrier()
        except RuntimeError:
            sys.exit(2)
