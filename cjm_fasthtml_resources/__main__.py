"The command `cjm-resources`, also as `python -m cjm_fasthtml_resources`"
import gc

def main() -> None:
    "Import the command without searching for garbage, of which an import leaves none; then run it"
    gc.disable()
    from .cli import main as command
    gc.freeze()   # nor is it searched later, or when Python ends
    gc.enable()
    command()


if __name__ == "__main__": main()
