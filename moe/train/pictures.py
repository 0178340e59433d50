"""placeholder"""


def draw(run_dir):
    return None
