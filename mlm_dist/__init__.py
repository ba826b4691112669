"""mlm_dist: masked language model pretraining, from raw text to a Hugging Face folder.

Reading order is import order: a module imports only modules above it in this list (tests/test_import_order.py).

    yaml_tree    YAML text -> a tree whose values know the file and line they came from
    schema       that tree -> frozen dataclasses; errors name the fix
    signals      what tells a run to stop, heard also inside a library
    cpu_products products of matrices on a CPU, by the library that is faster there
    world        ranks, device, sums and agreed flags across ranks, stop signals
    background   copies on the host, and a thread that writes them beside training
    watchdog     what ends a run that hangs: stacks, the silent ranks, an exit code
    pace         which rank is slow: each one's own work, without waiting for the others
    vocab        the tokenizer: train, load, save; special ids
    fetch        bytes from http or an object store: ranges, stalls, attempts
    redaction    secrets stay out of what a run writes
    logs         each rank's log file; quiet libraries
    manifest     what every file of a split must hold: counts, checksums, places of the records
    samples      text in ordinary WebDataset tars: members, samples, the text of each
    cache        a bounded folder of fetched files that a machine's processes share
    remote       splits at a URL: their shards fetched when they are wanted, a little ahead
    shards       what is inside a shard: write, read
    packing      documents -> fixed (B, T) rows with document boundaries
    lanes        shards -> lanes -> windows: the order of the data, and its cursor
    mixture      several sources with weights: which of them gives a lane's next row
    cursor       where a run stands in its data, and how many epochs that comes to
    loader       worker processes that read lanes ahead
    batch_size   rows of a step: how they grow, and how the ranks share them
    stream       lanes -> batches, with the cursor that stands after each
    masking      which tokens, and what replaces them; keyed, stateless, on the device
    linear_loss  a linear layer and its cross entropy in one, on a CPU
    mlm          MLM: the wrapper around any transformer; returns the loss, and on request its sums
    cpu_attention  attention in training on a CPU, by hand
    cpu_layer    a layer of the encoder on a CPU, forward and backward by hand
    gpu_attention  attention on a GPU that computes nothing across documents
    encoder      the fast encoder (ModernBERT architecture)
    huggingface  encoder <-> transformers: names, configs, weights of a local folder
    models       MODELS: encoder, any masked LM of transformers, any Python factory; FLOPs per token
    pieces       where ZeRO keeps the parameters: which piece of which one lies where, on every rank
    adam         AdamW by torch's fused kernel, StableAdamW
    muon         Muon: which matrices, Newton-Schulz, how ZeRO's ranks share it
    optim        parameter groups, OPTIMIZERS; clipping, steps that change nothing
    schedule     SCHEDULES: the learning rate as a pure function of the step
    compiling    the objective as one compiled graph, or why it can't be
    engine_config  the section `engine`, and the JSON that DeepSpeed is told
    engine       DeepSpeed: build, train_step, eval_step
    metrics      sums -> numbers; one reduction per report
    predictions  what the model puts in the place of masks in a few held-out texts
    run_folder   the folder of a run: its lock, how the run stands, what it came from and ran on
    mirror       the run in W&B, on a thread of its own
    alerts       what someone should hear of who isn't looking
    tracker      console, metrics.jsonl and its mirror, alerts
    history      a run folder read back: metrics as series, thinned where they are long
    charts       series -> inline SVG
    panels       which metrics stand in which chart
    notes        what a run folder tells in words: status, alerts, predictions, configuration
    report       one or several runs -> one HTML file
    checkpoint   what is in one: verify, resume, keep
    saver        how it's written: files, hashes, the manifest, the name
    evaluate     held-out loss with frozen masks
    config       RunConfig: the sections above; checks across sections
    assembly     a run's parts from its configuration: data, objective, a trained model
    start        what a run starts from: its own newest checkpoint, one of another run, or nothing
    prepare      a run on this rank before its first step: its parts, put together
    train        the loop
    card         what a model card says: how the model was trained
    export       a trained model -> Hugging Face folder
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # on first use: scripts that only read a configuration start without it
    if name == "MLM":
        from mlm_dist.mlm import MLM

        return MLM
    raise AttributeError(f"module 'mlm_dist' has no attribute {name!r}")
