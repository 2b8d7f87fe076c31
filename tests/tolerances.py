"""Every tolerance of the suite, each with the line of reasoning it comes from."""

# --- training side: cells, activity, masks ---------------------------------------------------------------------------

EPS64 = 2.0**-52

# A cell against another order of the same sums: 4 · n · eps · Σ|w·x| with n <= 32 terms and Σ|w·x| <= 16 per gate, and
# at most 8 steps that each pass on what came before.
CELL_F64 = 4 * 32 * EPS64 * 16 * 8

# A weight's gradient sums at most 64 (time, batch) pairs, each as exact as the cell.
GRADIENT_F64 = 64 * CELL_F64

# Central differences with step 1e-6: rounding eps·|f|/step ~ 1e-9, truncation step²·|f'''| ~ 1e-11, and where a corner
# of the triangle falls inside the step, step · slope / 4 with slope height / half_width = 1, times a gain of a few.
GRADCHECK = {"eps": 1e-6, "atol": 2e-6, "rtol": 0.0}

# A mean of at most 64 float64 values in [0, 1].
MEAN_F64 = 64 * EPS64

# The same mean as the difference of two float32 values, mean = own + (mean - own): two roundings of values below 1.
DISTRIBUTED_F32 = 4 * 2.0**-23
