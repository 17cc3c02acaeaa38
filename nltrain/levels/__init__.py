"""Levels: named sets of parameters, each stepping on its own token clock through its own ZeRO engine.

Import what you need from the module that holds it; only `engine` and `scheduler` import deepspeed:
    config.py     LevelConfig, LevelsConfig, ScheduleConfig        clock.py      TokenClock, staggered phases
    quantum.py    cut_quantum: sequences -> micro-steps x ranks    plan.py       LevelPlan: every parameter in exactly
    one level layout.py     how a flattened parameter lies in ZeRO's shards  window.py     accumulated gradients of
    one level guard.py      non-finite and spiking losses, on the device     ledger.py     bytes on the wire, beside
    the formula engine.py     one level over DeepSpeed                         scheduler.py  LevelScheduler: what the
    training loop calls
"""
