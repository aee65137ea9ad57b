"""The store that a training or a search reads: that of `--store`, or several joined."""

from jobs.terminal.entry_point import tell
from pneumo import storage
from pneumo.command_line import TrainArguments
from pneumo.dataset.joining import join_stores
from pneumo.errors import ConfigError


def open_store(arguments: TrainArguments, run_url: str, *, seed: int) -> str:
    """The URL of the store; several are joined in `<run>/store`. Raises StoreError, ConfigError."""
    urls = [storage.normalise(url) for url in arguments.store]
    if len(urls) == 1:
        if arguments.balanced:
            raise ConfigError("--balanced: has no effect on one store")
        return urls[0]
    joined = storage.join(run_url, "store")
    manifest = join_stores(urls, joined, balanced=arguments.balanced, seed=seed, tell=tell)
    numbers = ", ".join(f"{name} {entry.samples:,}" for name, entry in manifest.splits.items())
    tell(f"store: {len(urls)} joined in {joined}, to be given to jobs.evaluate: {numbers}")
    for why, number in manifest.left_out.items():
        tell(f"store: {number:,} {why} left out")
    return joined
