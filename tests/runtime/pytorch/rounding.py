"""First-order bounds on rounding, carried beside the values (running error analysis, Higham, "Accuracy and
Stability of Numerical Algorithms", 3.3): a computation of these steps is off `value` by at most `error` roundings,
one rounding being u = 2^-24 in fp32 and 2^-53 in double. Steps are what any sensible kernel does: a sum of n terms
may be taken in any order, so each of its terms is rounded up to n times; a library's exp, log, tanh, erf, sqrt or pow
is off by up to FUNCTION roundings of its result (4 ulp)."""
import torch

FUNCTION = 8


def constant(v, like):
    """A number that the type may not hold exactly."""
    t = torch.full((), float(v), dtype=like.dtype)
    return Rounded(t, t.abs())


class Rounded:
    def __init__(self, value, error=None):
        self.value = value
        self.error = torch.zeros_like(value) if error is None else error.expand_as(value)

    @staticmethod
    def of(x):
        return x if isinstance(x, Rounded) else Rounded(torch.as_tensor(x, dtype=torch.float64))

    def __add__(self, other):
        other = Rounded.of(other)
        v = self.value + other.value
        return Rounded(v, self.error + other.error + v.abs())

    def __neg__(self):
        return Rounded(-self.value, self.error)

    def __sub__(self, other):
        return self + -Rounded.of(other)

    def __mul__(self, other):
        other = Rounded.of(other)
        v = self.value * other.value
        return Rounded(v, self.error * other.value.abs() + other.error * self.value.abs() + v.abs())

    def __truediv__(self, other):
        other = Rounded.of(other)
        v = self.value / other.value
        return Rounded(v, self.error / other.value.abs() + other.error * (v / other.value).abs() + v.abs())

    def __rtruediv__(self, other):
        return Rounded.of(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return Rounded.of(other) - self

    def __getitem__(self, key):
        return Rounded(self.value[key], self.error[key])

    def map(self, f):
        """A change of shape."""
        return Rounded(f(self.value), f(self.error))

    def sum(self, dim):
        n = 1
        for d in [dim] if isinstance(dim, int) else dim:
            n *= self.value.shape[d]
        size = self.value.abs().sum(dim, keepdim=True)
        return Rounded(self.value.sum(dim, keepdim=True), self.error.sum(dim, keepdim=True) + (n - 1) * size)

    def matmul(self, other):
        a, b = self.value.abs(), other.value.abs()
        n = self.value.shape[-1]
        return Rounded(self.value @ other.value, self.error @ b + a @ other.error + n * (a @ b))

    def transpose(self):
        return self.map(lambda v: v.transpose(-1, -2))

    def function(self, f, slope):
        """slope: of f at the value, times the value's error."""
        v = f(self.value)
        moved = torch.where(self.error == 0, self.error, self.error * slope.abs())
        return Rounded(v, moved + FUNCTION * v.abs())

    def exp(self):
        return self.function(torch.exp, torch.exp(self.value))

    def log(self):
        return self.function(torch.log, 1 / self.value)

    def tanh(self):
        return self.function(torch.tanh, 1 - torch.tanh(self.value) ** 2)

    def erf(self):
        return self.function(torch.erf, 2 / torch.pi**0.5 * torch.exp(-(self.value**2)))

    def rsqrt(self):
        return self.function(torch.rsqrt, 0.5 * self.value**-1.5)

    def power(self, p):
        return self.function(lambda v: v**p, p * self.value ** (p - 1))
