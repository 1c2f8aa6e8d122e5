"""The certificate: how far a network is from the optimum over all networks of any width.

Everything is recomputed from weights and data alone, in float64; only a heuristic certificate beyond `LARGE` takes its
responses in the problem's own arithmetic. No solver is imported and none is believed.
Any Conv2d → ReLU → average or maximum pooling → Linear qualifies, whoever trained it, and any with another
`Activation`. These and pooling are positively homogeneous, so each neuron is first balanced (‖u_j‖ = ‖V_j‖, which never
raises the objective), and the intercept re-optimised.
"""

from convcvx.certificate.parameters import certify_parameters, judged
from convcvx.certificate.record import Certificate

__all__ = ["Certificate", "certify_parameters", "judged"]
