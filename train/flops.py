"""How much of what the devices can do is used: model FLOPs over time and peak (MFU)."""

PEAK_TFLOPS = {
    "MI300X": 1336.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40": 181.05,
    "L20": 119.5,
    "H20": 148.0,
    "910B": 354.0,
    "3070 Ti": 21.75,
}
"""Part of a device's name -> dense bf16 TFLOP/s, as the published trainer has them."""


def peak_tflops(device_name: str, given: float = 0.0) -> float:
    """Peak of one device.

    Args:
        device_name: as the driver tells it; empty on a CPU.
        given: `--peak_device_tflops`; 0: by the name.

    Returns:
        0 if it is not known.
    """
    if given:
        return given
    # The longest part that fits: "H20" is in "H200" too.
    fitting = [part for part in PEAK_TFLOPS if part in device_name]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else 0.0
