"""Pools of simulated features, whose truth is known."""

import numpy as np

from mech_unlearn.verdict.features import FEATURES, RECOVERY, Pool, matrix

SIDES = {"suppressed/late": "uds_recovered", "suppressed/early": "sae", "suppressed/path": "uds_subject_recovered"}


def simulated(groups=60, facts=4, seed=0, shift=1.0):
    """Gaussian features: each kind of suppressor shows in one recoverability, the others are those of deleted facts."""
    rng = np.random.default_rng(seed)
    x, kind, family, cluster, group, base = [], [], [], [], [], []
    kinds = ["intact", "deleted", "collapsed", *SIDES]
    for g in range(groups):
        for name in kinds:
            for variant in ("a", "b"):
                center = dict.fromkeys(FEATURES, 0.0)
                if name == "intact":
                    center |= dict.fromkeys(
                        ("output", "heldout", "uds_recovered", "uds_subject_recovered", "logit_lens", "probe"), 1.0
                    )
                if name == "collapsed":
                    center |= {"neighbor_loss": 1.0, "general_kl": 4.0}
                if name in SIDES:
                    center[SIDES[name]] = shift
                own = rng.normal(0, 0.1, len(FEATURES))
                for _ in range(facts):
                    x.append([center[f] for f in FEATURES] + own + rng.normal(0, 0.1, len(FEATURES)))
                    kind.append(name)
                    family.append(f"{name} {variant}")
                    cluster.append(f"{name} {variant} {g}")
                    group.append(str(g))
                    base.append(f"retrained {g % 8}" if name == "deleted" else "full")
    spread = dict.fromkeys(RECOVERY, 0.1)
    values = matrix([dict(zip(FEATURES, row)) for row in x], cluster, spread)
    return Pool(values, tuple(kind), tuple(family), tuple(cluster), tuple(group), tuple(base), spread)


def parts(pool, first=20, second=30):
    names = sorted(set(pool.group), key=int)
    return names[:first], names[first : first + second], names[first + second :]
