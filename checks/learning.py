"""Whether training teaches what the rollouts say: four objectives, and for each a control that says nothing.

Run as: python checks/learning.py MODEL ROLLOUTS --tasks INPUTS [--out checks/results/learning.json] [--only NAME]

Real rollouts of questions with right and wrong answers are divided by twin clusters. On held-out questions the margin
is the log-probability of a right answer less that of a wrong one, both well-formed and a token apart, so that neither
length nor format tells them apart. It is measured before and after; the interval of the mean difference is that of
`gymtrl compare`. The controls take the same data with answers exchanged between questions (SFT), with labels drawn at
random (DPO, KTO) or with rewards exchanged within a group (GRPO).
"""
