"""More data than memory and more machines than one: codes from shards on disk, scoring by a cluster (notebook 12).

Tuning needs nothing from here where the LLM fits a card: `bu.tune` under `accelerate launch` takes its share of every
step. `shard` is for an LLM that does not.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

import binllm_utils as bu
from binllm_data import check_replaceable
from binllm_llm import with_lora

COLUMNS = ["user", "item", "label"]


# ------------------------------------------------------------------------------------------------------------ codes
class Shards:
    """Training rows in a folder of Parquet files, read one row group at a time; one pass counts and checks them.

    Columns `user, item, label`: ids from 0 as integers and 0 or 1; others are not read. len() is the number of rows;
    `users` and `items` count each id's rows, `likes` those with label 1. together: row groups whose rows are mixed.
    Raises OSError when there is no such file, ValueError naming file and row group for anything else in it.
    """

    def __init__(self, folder, together=8):
        files = sorted(Path(folder).glob("*.parquet"))
        if not files:
            raise OSError(f"{folder} holds no .parquet file")
        self.likes, self.together = 0, together
        self.users, self.items = np.zeros(0, np.int64), np.zeros(0, np.int64)
        kept = {file: _metadata(file) for file in files}
        self.groups = [(file, group) for file in files for group in range(kept[file].num_row_groups)]
        rows = sum(found.num_rows for found in kept.values())
        self.most = min(1 << 31, max(1_000_000, 20 * rows))  # with larger ids the counts would fill the memory
        for file, group in tqdm(self.groups, desc="counting rows", leave=False, disable=len(self.groups) < 20):
            user, item, label = self._read(file, group)
            self.users, self.items = _add(self.users, user), _add(self.items, item)
            self.likes += int(label.sum())
        if not 0 < self.likes < len(self):
            raise ValueError(f"{folder}: of {len(self)} rows {self.likes} are likes; likes and dislikes needed")

    def __len__(self):
        return int(self.users.sum())

    def _read(self, file, group):
        """user, item, label of a row group: int64 arrays."""
        where = f"{file}, row group {group}"
        try:
            table = pq.ParquetFile(file).read_row_group(group, columns=COLUMNS)
            found = [table[name].to_numpy() for name in COLUMNS]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{where} cannot be read ({error!s:.200}); it needs the columns {COLUMNS}") from None
        for name, values in zip(COLUMNS, found):
            most = 2 if name == "label" else self.most
            if values.dtype.kind not in "iub" or (len(values) and not 0 <= values.min() <= values.max() < most):
                wanted = "0 or 1" if name == "label" else f"whole numbers from 0 to {self.most - 1:,}"
                raise ValueError(f"{where}: {name} must be {wanted}, none missing; ids are numbered by pd.factorize")
        return [values.astype(np.int64) for values in found]

    def batches(self, size, shuffle):
        """All rows once, in a new order: tensors of users, items and labels, `size` rows a batch but for the last.

        Row groups come in random order and the rows of `together` of them, or of a batch's worth, are mixed.
        shuffle: a torch.Generator.
        """
        order, held, new = torch.randperm(len(self.groups), generator=shuffle).tolist(), [], 0
        for number, place in enumerate(order, 1):
            held.append(torch.from_numpy(np.stack(self._read(*self.groups[place]))))
            last, count, new = number == len(order), sum(rows.shape[1] for rows in held), new + 1
            if not last and (new < self.together or count < size):
                continue
            rows = torch.cat(held, dim=1)[:, torch.randperm(count, generator=shuffle)]
            whole = count if last else count // size * size
            for users, items, labels in rows[:, :whole].split(size, dim=1):
                yield users, items, labels.float()
            held, new = [rows[:, whole:]], 0


def _metadata(file):
    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no Parquet file ({error!s:.200})") from None


def _add(counts, ids):
    """`counts` with one more for each of `ids`, longer where an id asks for it."""
    found, times = np.unique(ids, return_counts=True)  # a piece has few of all ids
    if len(found) and found[-1] >= len(counts):
        counts = np.pad(counts, (0, found[-1] + 1 - len(counts)))
    counts[found] += times
    return counts


def fit_streamed(shards, valid, bits=32, seed=0, recipe="distinct", max_epochs=10, progress=True):
    """(Codes, learning curve): as `bu.fit_codes`, of rows that are read from disk anew each epoch.

    valid: DataFrame `user, item, label`, in memory; the epoch that ranks it best is kept. Codes go up to the largest id
    of either. What is known of an item besides its ratings is not used. In memory are a few row groups, a step's rows,
    and of each user and item `bits` numbers eight times (weight, gradient, two moments, moving average, the best
    epoch's, dither and its copy), and about as often again within a step.
    Raises ValueError as `bu.fit_codes` does.
    """
    how = replace(bu.check_recipe(bits, recipe, max_epochs), features=False)
    bu.check_both_classes(valid=valid)
    sizes = [max(len(counts), int(valid[side].max()) + 1) for side, counts in _sides(shards)]
    seen = SimpleNamespace(**{side: np.flatnonzero(counts) for side, counts in _sides(shards)})
    shell = SimpleNamespace(n_users=sizes[0], n_items=sizes[1], train=vars(seen), valid=valid)
    torch.manual_seed(seed)
    model = bu.BinMF(shell, bits, how)
    bu.zero_unseen(model, seen)
    curve = bu.train_cf(
        model, shell, **how.settings(len(shards)), seed=seed, max_epochs=max_epochs, rows=shards, progress=progress
    )
    return model.codes(), curve


def _sides(shards):
    return ("user", shards.users), ("item", shards.items)


def write_shards(frames, folder, rows_a_group=1 << 17):
    """Write each DataFrame of `frames`, an iterable, to a Parquet file with small row groups; `folder` is made anew.

    Raises ValueError for a folder that holds other files than such.
    """
    check_replaceable(folder, ("[0-9]" * 5 + ".parquet",), "shards")
    with bu.replacing(folder) as part:
        part.mkdir(exist_ok=True)
        for number, frame in enumerate(frames):
            table = pa.Table.from_pandas(frame[COLUMNS], preserve_index=False)
            pq.write_table(table, part / f"{number:05d}.parquet", row_group_size=rows_a_group)


# ---------------------------------------------------------------------------------------------------------- scoring
def score_everywhere(client, load, prompts, rows_a_part=256, progress=True):
    """P(Yes) of `prompts`, float64 [n], by the workers of a dask.distributed `client`.

    load: a function without arguments that gives (model, tokenizer); a worker calls it once a run, and keeps the model
    until the next. Prompts that begin alike go to one worker together. When a worker dies, another gets what it had;
    a part that four workers died of is given up (dask's KilledWorker).
    dask sends functions by pickle, which can do anything: keep the scheduler on loopback or behind TLS.
    Raises ValueError for no prompts, no worker, or workers with more than one thread, for a model answers one at a
    time; what `load` or `bu.score` raise is raised here, and the other parts are given up.
    """
    from distributed import as_completed

    if isinstance(prompts, str) or rows_a_part < 1:
        raise ValueError(f"give a list of prompts, and parts of one row or more; here {rows_a_part} rows a part")
    prompts = list(prompts)  # by place, whatever a Series' index
    threads = {worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()}
    if not len(prompts) or not threads:
        raise ValueError(f"{len(prompts)} prompts and {len(threads)} workers; give some of both")
    if threads != {1}:
        raise ValueError(f"a worker has {max(threads)} threads; start workers with --nthreads 1, more of them instead")
    order, run = sorted(range(len(prompts)), key=prompts.__getitem__), uuid4().hex
    parts = [order[start : start + rows_a_part] for start in range(0, len(order), rows_a_part)]
    futures = {client.submit(_score_part, run, load, [prompts[i] for i in part], pure=False): part for part in parts}
    p = np.full(len(prompts), np.nan)
    try:
        with tqdm(total=len(prompts), desc="scoring", disable=not progress, leave=False) as bar:
            for future in as_completed(futures):
                p[futures[future]] = future.result()
                bar.update(len(futures[future]))
    finally:
        client.cancel(list(futures))
    return p


def _score_part(run, load, prompts):
    """On a worker: answers of one part, by the model that it loaded for this run."""
    from distributed import get_worker

    worker = get_worker()
    if getattr(worker, "llm", (None,))[0] != run:
        worker.llm = (None,)  # the one before goes first, for two may not fit
        worker.llm = run, *load()
    _, model, tokenizer = worker.llm
    return bu.score(model, tokenizer, prompts, progress=False)


# ----------------------------------------------------------------------------------------------------------- tuning
def shard(model, lora="all", seed=0):
    """Cut the layers of `model` among the processes of `accelerate launch`; returns it, on each one's card.

    Fully sharded (FSDP): each process keeps its part of every layer's frozen weights, in four bits or not; a layer is
    put together when its turn comes and let go after it. Word vectors and LoRA's matrices stay whole everywhere: those
    of an adapter that `model` carries, else new ones, as `bu.tune` would make them. `bu.tune`, `bu.score` and
    `bu.save_adapter` then do what they do otherwise, but all processes must call the first two, with the same prompts.
    Where the model fits no card, load it by `bu.load_llm(…, device="cpu")`. In one process nothing is cut.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model, state = with_lora(model, lora), PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes > 1:
        mesh = init_device_mesh(state.device.type, (state.num_processes,))
        for layer in model.get_base_model().get_decoder().layers:
            whole = {p for name, p in layer.named_parameters() if "lora_" in name}
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return model.to(state.device)
