"""The whole job in Python: collect, inspect, filter, format, train, validate.

Run as: python examples/job.py MODEL TASKS.jsonl OUT
"""

import sys
from pathlib import Path

import gymtrl

model, tasks, out = map(Path, sys.argv[1:])
rollouts = out / "collected" / "rollouts.jsonl"
heldout = out / "filtered" / "heldout_inputs.jsonl"
sampling = {"temperature": 1.0, "max_output_tokens": 32, "repeats": 2}

with gymtrl.gym_session("reasoning_gym", out / "logs") as gym:
    gymtrl.collect_rollouts(model, tasks, out / "collected", gymtrl.CollectSettings(**sampling), session=gym)
    print(gymtrl.inspect_rollouts([rollouts]).good_for)
    selection = gymtrl.FilterSettings(cluster="metadata.twin", validation=0.3)
    gymtrl.filter_rollouts([rollouts], out / "filtered", selection)
    gymtrl.format_sft(out / "filtered", out / "dataset", gymtrl.FormatSftSettings(model=str(model)))
    gymtrl.train(out / "dataset", out / "trained", gymtrl.TrainSftSettings())
    trial = gymtrl.ValidateSettings(**sampling, baseline=str(model), tasks=heldout, cluster="metadata.twin", seed=1)
    comparison = gymtrl.validate(out / "trained", out / "validation", trial, session=gym)
print(comparison.verdict)
