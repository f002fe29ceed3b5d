// Presses the button of a notebook panel that no reader sees, as long as a page shows the panel: a page that is closed
// does not say so. The button names the seconds; in a tab that is hidden, a browser makes a minute of them.
function cjmSign(root) {
  const press = () => {
    // only the button itself is told, and nothing around it; it is disabled while the kernel runs a cell
    if (root.isConnected) root.querySelector(".cjm-sign:enabled")?.dispatchEvent(new MouseEvent("click"));
    else clearInterval(root.cjmSigns);
  };
  clearInterval(root.cjmSigns);
  root.cjmSigns = setInterval(press, 1000 * Number(root.querySelector(".cjm-sign").textContent));
  if (!root.cjmSeen) {
    root.cjmSeen = () => document.hidden || press();
    document.addEventListener("visibilitychange", root.cjmSeen);
  }
  setTimeout(press, 1000);
}

for (const root of document.querySelectorAll(".cjm:has(.cjm-sign)")) cjmSign(root);
