import pytest
from helpers.browser import launched


@pytest.fixture(scope="module")
def browser():
    """Yield a browser for the tests of a file: its event loop holds their thread, where a server runs its own."""
    with launched() as browser:
        yield browser


@pytest.fixture
def opened(browser):
    """Yield what opens a page; whatever the console complains about fails the test, and so does any request."""
    views, complaints, requests = [], [], []

    def opened(path):
        view = browser.new_page(viewport={"width": 1280, "height": 1000})
        view.set_default_timeout(10_000)
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on("request", lambda request: requests.append((request.url, path.as_uri())))
        view.goto(path.as_uri())
        views.append(view)
        return view

    yield opened
    for view in views:
        view.close()
    assert not complaints
    assert all(url == page or url.startswith("data:") for url, page in requests)
