"""Is B better than A? The mean difference of paired runs, with Student's interval; and runs compared at equal KL.

The runs of a pair share a seed, so what the seed does to both is not counted as noise. Everything is in the units of
the metric. A run's curve is a list of (KL, metric), one for each kept copy of its model, in the order of training.
"""

import math
from functools import cache
from statistics import NormalDist, fmean, stdev

LEVEL = 0.05  # share of pairs of equal commands that get a verdict
POWER = 0.8  # share of pairs of commands, as far apart as `detectable`, that get the right one


def within(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with df degrees of freedom: exact (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(df))
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(df // 2):
        total += term
        term *= math.cos(theta) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    even_odd = math.sin(theta) * total
    return 2 / math.pi * (theta + even_odd) if odd else even_odd


@cache
def t_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for p of at least 1/2: by bisection of its arctangent."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if 0.5 + within(math.sqrt(df) * math.tan(middle), df) / 2 < p:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def power(shift: float, df: int) -> float:
    """How often t(0.975) is exceeded where the true difference is `shift` standard errors, all estimated with df
    degrees of freedom: P((Z + shift) / (U / sqrt(df)) > t), with Z normal and U chi, as a sum over U."""
    t, step = t_quantile(1 - LEVEL / 2, df), 0.01
    constant = math.log(2) * (1 - df / 2) - math.lgamma(df / 2)  # of the density of chi
    total = 0.0
    for i in range(round((math.sqrt(df) + 8) / step)):
        u = (i + 0.5) * step
        density = math.exp(constant + (df - 1) * math.log(u) - u**2 / 2)
        total += density * step * NormalDist().cdf(shift - t * u / math.sqrt(df))
    return total


@cache
def detectable_shift(df: int) -> float:
    """The true difference, in standard errors, that gets the right verdict with probability POWER: by bisection."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, df) < POWER else (low, middle)
    return low


def compare(a: list[float], b: list[float], higher_is_better: bool = True) -> dict:
    """The paired t-test of n >= 2 values of each side, a[i] and b[i] of the same seed.

    difference  the mean of b - a
    low, high   its 95% interval: difference -+ t(0.975) s / sqrt(n), with n - 1 degrees of freedom
    detectable  the true difference with which 80% of such comparisons get the right verdict, if the spread of the
                differences is the s seen here: a multiple of s / sqrt(n), by the noncentral t distribution
    differences those of the n pairs
    verdict     the better side, "a" or "b", if the interval leaves out 0; else "none". If all differences are equal
                there is no spread to judge by, and no verdict.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n = len(differences)
    difference = fmean(differences)
    error = stdev(differences) / math.sqrt(n)  # standard error of the mean
    if error < 1e-12 * max(map(abs, [*a, *b])):  # rounding is no spread
        error = 0.0
    half = t_quantile(1 - LEVEL / 2, n - 1) * error
    verdict = "none"
    if error > 0 and abs(difference) > half:
        verdict = "b" if (difference > 0) == higher_is_better else "a"
    return {
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "detectable": detectable_shift(n - 1) * error,
        "verdict": verdict,
        "differences": differences,
    }


def value_at(curve: list[tuple[float, float]], kl: float) -> float:
    """The metric where the run first reaches this KL, interpolated between the copies before and after.

    It is linear in the square root of the KL, in which rewards are nearly straight (Gao et al., arXiv 2210.10760).
    """
    (before, y), *later = curve
    for after, z in later:
        if before <= kl <= after:
            low, here, high = (math.sqrt(max(x, 0.0)) for x in (before, kl, after))  # estimates near 0 may be negative
            return y + (z - y) * (here - low) / (high - low) if high > low else y
        before, y = after, z
    raise ValueError(f"the run does not reach a KL of {kl}")


def at_equal_kl(a: list, b: list, higher_is_better: bool = True) -> dict:
    """compare() of the curves a[i] and b[i] at "kl", the largest KL that all of them reach.

    {"reason": why not} if there are no copies, or a curve begins beyond the end of another.
    """
    curves = [*a, *b]
    if min(map(len, curves)) < 2:
        return {"reason": "a run kept no copies of its model; give --keep-every N"}
    starts = [[curve[0][0] for curve in side] for side in (a, b)]
    ends = [[max(kl for kl, _ in curve) for curve in side] for side in (a, b)]
    kl = min(map(min, ends))
    if max(map(max, starts)) > kl:
        ranges = [f"{max(start):.2f} to {min(end):.2f}" for start, end in zip(starts, ends)]
        between = f"all copies of a reach from {ranges[0]} nats, those of b from {ranges[1]}"
        return {"reason": f"the curves do not overlap: {between}; keep copies more often"}
    values = [[value_at(curve, kl) for curve in side] for side in (a, b)]
    return {"kl": kl} | compare(*values, higher_is_better)
