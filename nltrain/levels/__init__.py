"""Levels: named sets of parameters, each stepping on its own token clock through its own ZeRO engine.

Import what you need from the module that holds it; only `zero`, and what imports it (`engine`, `scheduler`, `digest`),
load deepspeed.

    config.py      LevelConfig, LevelsConfig, ScheduleConfig
    clock.py       TokenClock, staggered phases
    quantum.py     cut_quantum: sequences -> micro-steps x ranks
    recipes.py     what else must change with the quantum
    split.py       LevelPart: every parameter in exactly one level
    optimizers.py  what config, engine and plan know about each optimizer
    groups.py      which parameters are flattened together, in which order
    layout.py      how a flattened parameter lies in ZeRO's shards
    window.py      accumulated gradients of one level
    zero.py        the groups of one level on DeepSpeed
    offload.py     host memory for a level that sleeps
    engine.py      one level: shards, window, optimizer step
    guard.py       non-finite and spiking losses, on the device
    ledger.py      bytes on the wire, beside the formula
    scheduler.py   LevelScheduler: what the training loop calls
    digest.py      one hash of all weights
"""
