# For a JupyterLab that finds this folder in JUPYTER_CONFIG_PATH, as the one of `make lab` does.
#
# Messages of widgets no longer make the kernel "busy". JupyterLab would draw its toolbar anew and
# fetch another favicon at each key of the annotation widget: a seventh to a quarter of the time
# from key to picture (README, "Measured"). They do not count as activity either: leave this out
# where something stops kernels that seem idle.
c.MappingKernelManager.untracked_message_types.append("comm_msg")  # noqa: F821
