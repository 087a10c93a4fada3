"""Elementary functions in fewer expensive steps than NumPy's, which cost 10 to 14 ns a number.

Errors are absolute, below 1e-15: enough where the results are added to numbers of size 1.
"""

import numpy as np

from theory.protocols import FloatArray

#: tanh(20) differs from 1 by less than half a rounding, and e^40 is far from overflow.
SATURATED = 20.0


def tanh(z: FloatArray) -> FloatArray:
    """Return tanh z = 1 - 2/(1 + e^(2 z)), to 3.5e-16: exponentials are NumPy's cheapest functions.

    Measured against 80-bit numbers at 4 million z: 3.3e-16 at most, for |z| < 0.1 2.2e-16, which
    there is relative 2.2e-16/|z|. So gradients of the chains of `theory.problems` are exact to
    3e-16 (states are about 0.5), but chains with inputs of length 1e-6 have 6 to 9 digits only.
    expm1 would keep all digits, for up to twice the time (it branches).

    >>> tanh(np.array([-1e3, 0.0, 1e3])).tolist()
    [-1.0, 0.0, 1.0]
    """
    result = np.minimum(z, SATURATED)
    result += result
    np.exp(result, out=result)
    result += 1.0
    np.divide(2.0, result, out=result)
    return np.subtract(1.0, result, out=result)


def cos_sin(angle: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return (cos, sin) of an angle in radians, to 4e-16, both from t = tan(angle/2).

    cos = 2/(1 + t^2) - 1 and sin = 2 t/(1 + t^2): one call where there would be two.

    >>> cos, sin = cos_sin(np.array([0.0, 0.5 * np.pi, np.pi]))
    >>> cos.round(15).tolist(), sin.round(15).tolist()
    ([1.0, 0.0, -1.0], [0.0, 1.0, 0.0])
    """
    sin = np.multiply(angle, 0.5)
    np.tan(sin, out=sin)
    cos = sin * sin
    cos += 1.0
    np.divide(2.0, cos, out=cos)
    sin *= cos
    cos -= 1.0
    return cos, sin
