const cut = document.getElementById("cut");
if (cut) cut.addEventListener("input", () =>
  document.documentElement.style.setProperty("--cut", cut.value + "%"));
