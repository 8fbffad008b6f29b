"""Regression on seven tables of UCI, each method beside its rivals: ``python -m tests.benchmarks.uci``.

Networks of 50 ReLU units (100 for protein) on the published splits (20, protein 5): RMSE and NLL of the test rows in
the units of y. Every method has four settings or fewer, among which the NLL of a fifth of a split's training rows
chooses, rows that the fits which are compared do not see; the chosen one then trains on all training rows of the split.
Test rows choose nothing. Trainings have 1,000 or 5,000 steps, and four times as many where there are more than 5,000
rows. ``--gaps`` leaves the middle third of one input out instead, for each input in turn (Foong et al. 2019). A table
of your own is a file NAME.npz beside the others, with x ``[N, D]``, y ``[N]`` and test_mask ``[splits, N]``, and
``--tables NAME``.

Rows are written as they come, a file for each table, and those that are there are not measured again, but for rows
whose settings were chosen among others than those of today: the run can be stopped and continued, and a second process
can take other tables. A split of a small table takes some ten minutes on one core; ``python -m
tests.benchmarks.tables`` shows what is there in docs/results.md.
"""
