"""The catalogue of statements, by key."""

from theory.corrected import (
    C_TAU,
    LEMMA1_PRIME,
    THEOREM2_PRIME,
    THEOREM_A,
    THEOREM_A_YOUNG,
    THEOREM_D,
    THEOREM_F,
    THEOREM_M,
    THEOREM_V,
)
from theory.published import (
    COROLLARY,
    FEATURES_REPLAY,
    INDEPENDENCE,
    LEMMA1,
    LEMMA1_STEADY,
    LIAN,
    THEOREM1,
    THEOREM2,
)
from theory.statement import Statement

#: In reading order: what was published, what replaces it, what is only conjectured.
STATEMENTS: dict[str, Statement] = {
    statement.key: statement
    for statement in (
        LEMMA1,
        LEMMA1_STEADY,
        INDEPENDENCE,
        THEOREM1,
        THEOREM2,
        COROLLARY,
        FEATURES_REPLAY,
        LIAN,
        LEMMA1_PRIME,
        THEOREM_A,
        THEOREM_A_YOUNG,
        THEOREM_V,
        THEOREM_D,
        THEOREM2_PRIME,
        THEOREM_F,
        THEOREM_M,
        C_TAU,
    )
}


def statement_named(key: str) -> Statement:
    """Return the statement of that key.

    Raises ValueError, listing the keys, if there is none.

    >>> statement_named("theorem-a").title
    'delayed gradients, constant step size'
    """
    if key not in STATEMENTS:
        raise ValueError(f"statement {key!r} is unknown; known are {', '.join(STATEMENTS)}")
    return STATEMENTS[key]
