"""Clean a notebook as it is saved and export its module: `uv run jupyter lab --config=configs/jupyter_server_config.py`"""

import os

c = get_config()  # noqa: F821  (Jupyter puts it there)


def _clean(model, path, contents_manager, **_):
    from nbdev.clean import clean_jupyter

    clean_jupyter(path=os.path.join(contents_manager.root_dir, path), model=model)


def _export(model, os_path, contents_manager, **_):
    from nbdev.export import nb_export

    if model["type"] != "notebook":
        return
    try:
        nb_export(os_path)
    except Exception as error:  # a page in the middle of an edit may not parse: say so, save anyway
        contents_manager.log.warning("not exported: %s: %s", os_path, error)


c.FileContentsManager.pre_save_hook = _clean
c.FileContentsManager.post_save_hook = _export
