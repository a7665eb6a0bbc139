"""nbval over the notebooks: progress bars and the HTML twin of a table are no part of the comparison."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "text/html")
