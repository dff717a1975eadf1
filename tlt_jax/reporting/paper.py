"""Figures of "Taming the Long Tail" (arXiv 2511.16665) that ours are drawn beside."""

FIGURE_13_VERIFY = (16, 32, 48, 64, 96, 128)
FIGURE_13_ACCEPT_LENGTH = {
    4: (4.63, 4.74, 4.78, 4.81, 4.81, 4.82),
    6: (5.71, 6.08, 6.16, 6.31, 6.31, 6.36),
    8: (6.34, 7.01, 7.24, 7.39, 7.49, 7.51),
    10: (6.80, 7.63, 7.97, 8.21, 8.31, 8.39),
    12: (7.02, 8.05, 8.49, 8.76, 8.86, 9.06),
    16: (7.25, 8.44, 8.97, 9.23, 9.51, 9.78),
}
"""Accept length by draft depth, for each count of verified tokens (Qwen2.5-32B, one sequence)."""

TABLE_4_ROWS = (1, 2, 4, 8, 16, 32)
TABLE_4_SPEEDUP = {
    16: (3.22, 3.08, 3.01, 2.73, 2.67, 2.48),
    32: (3.46, 3.28, 3.09, 2.63, 2.52, 2.23),
    48: (3.56, 3.39, 3.13, 2.51, 2.24, 1.90),
    64: (3.62, 3.38, 2.98, 2.27, 1.91, 1.70),
}
"""Speed-up by verified tokens, for each batch size (Qwen2.5-32B, depth 10, top-k 8)."""

TABLE_5_GIGABYTES = {"one strategy": 7.81, "every strategy": 30.39, "bucketed": 10.69}
"""Memory of captured graphs."""

FIGURE_16_ACCEPTANCE = {
    "frozen": (0.92, 0.72, 0.52, 0.36, 0.24, 0.16, 0.10, 0.06),
    "adaptive": (0.96, 0.88, 0.78, 0.65, 0.50, 0.38, 0.28, 0.20),
}
"""Share of drafts accepted at draft position 1 to 8, read off a plot: approximate."""

FIGURE_17_HELD_UP_MS = {"synchronous": 893, "asynchronous": 280, "selective": 97}
"""How long drafter training is held up by a checkpoint."""

FIGURE_17_SAMPLES_PER_SECOND = {"packed rows": 29.6, "padded batches": 13.3}
"""How fast the drafter trains."""
