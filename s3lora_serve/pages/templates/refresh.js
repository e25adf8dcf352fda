// The page is whole without this; with it, it stays up to date.
setInterval(async () => {
  const at = document.activeElement;
  if (document.hidden || (at && at.matches("input"))) return;
  const stale = document.getElementById("stale");
  try {
    const answer = await fetch(location.href);
    if (!answer.ok) throw new Error(answer.status);
    const text = await answer.text();
    const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
    const id = at && at.id;
    document.querySelector("main").replaceWith(fresh);
    if (id) document.getElementById(id)?.focus();
    stale.hidden = true;
  } catch {
    stale.hidden = false;
  }
}, 5000);
