"""Writes the message classes of `open_inference_grpc.proto`; needs grpcio-tools 1.81 (its protoc writes 6.x code).

    python -m router.oip.generate            rewrites open_inference_grpc_pb2.py beside this file
    python -m router.oip.generate FOLDER     writes it under FOLDER/router/oip instead (a test compares the two)

protoc's code registers `inference.*` in protobuf's one default pool, which refuses a second definition of a name: a
process that also imports tritonclient would fail on whichever comes last. So the one call that names the pool is
changed to a pool of this module's own. Code of protoc 7.x would not import beside a 6.x runtime.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTO = "router/oip/open_inference_grpc.proto"
DEFAULT_POOL, OWN_POOL = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"


def generate(folder: Path) -> None:
    """Write the classes under `folder`/router/oip; CalledProcessError where protoc fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--python_out={folder}", PROTO]
    subprocess.run(command, cwd=ROOT, check=True)
    code = folder / PROTO.replace(".proto", "_pb2.py")
    text = code.read_text()
    if text.count(DEFAULT_POOL) != 1:
        raise ValueError(f"{code} names the default pool {text.count(DEFAULT_POOL)} times; it was expected once")
    code.write_text(text.replace(DEFAULT_POOL, OWN_POOL))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
