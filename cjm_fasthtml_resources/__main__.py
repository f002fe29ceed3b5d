"The command `cjm-resources`, also as `python -m cjm_fasthtml_resources`"
import gc

def main() -> None:
    "Import the command without searching for garbage, of which an import leaves none; then run it"
    gc.disable()
    from .cli import main as command
    gc.freeze()   # nor is it searched later, or when Python ends
    gc.enable()
    command()


def run() -> None:
    "Run the command as a process of its own, which ends with it"
    try: main()
    except SystemExit as ended:
        from .commands.ending import leave
        leave(ended.code)
        raise


if __name__ == "__main__": run()
