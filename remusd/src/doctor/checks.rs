//! The checks of one host.

use std::collections::BTreeMap;

use super::{Finding, Probe};

/// What `xl info` says.
pub(super) struct XlInfo {
    values: BTreeMap<String, String>,
    /// Why there is nothing.
    error: Option<String>,
}

impl XlInfo {
    pub(super) fn of(probe: &dyn Probe) -> Self {
        let (values, error) = match probe.run("xl", &["info"]) {
            None => (BTreeMap::new(), Some("there is no xl".to_owned())),
            Some(output) if !output.ok => (BTreeMap::new(), Some(format!("xl info: {}", output.err))),
            Some(output) => {
                let lines = output.out.lines().filter_map(|line| line.split_once(':'));
                (lines.map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned())).collect(), None)
            }
        };
        Self { values, error }
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// `4.17`.
    pub(super) fn version(&self) -> Option<String> {
        Some(format!("{}.{}", self.get("xen_major")?, self.get("xen_minor")?))
    }

    fn capabilities(&self) -> Vec<&str> {
        self.get("virt_caps").unwrap_or_default().split_whitespace().collect()
    }
}

pub(super) fn privileges(probe: &dyn Probe) -> Finding {
    match probe.user() {
        0 => Finding::ok("privileges", "root"),
        user => Finding::fail("privileges", format!("user {user}"), "run it as root: Xen and the network need it"),
    }
}

pub(super) fn dom0(probe: &dyn Probe) -> Finding {
    match probe.read("/proc/xen/capabilities") {
        Some(text) if text.contains("control_d") => Finding::ok("dom0", "this is the control domain"),
        Some(_) => Finding::fail("dom0", "this is a guest of Xen", "run it in dom0, the domain that `xl` works in"),
        None => Finding::fail(
            "dom0",
            "no Xen under this kernel",
            "boot the entry \"with Xen hypervisor\" (xen-hypervisor-amd64), and mount /proc/xen (modprobe xenfs)",
        ),
    }
}

pub(super) fn xen(probe: &dyn Probe, xl: &XlInfo) -> Vec<Finding> {
    let Some(version) = xl.version() else {
        let why = xl.error.clone().unwrap_or_else(|| "xl info has no version".into());
        return vec![Finding::fail("xen", why, "install xen-utils of the running Xen; `xl info` must work")];
    };
    let number = |key: &str| xl.get(key).and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    let found = match (number("xen_major"), number("xen_minor")) {
        (4, 17) => Finding::ok("xen", format!("Xen {version}")),
        (4, 16..=22) => Finding::warn(
            "xen",
            format!("Xen {version}"),
            "remusd is tested on 4.17; try it with a guest that does not matter first",
        ),
        _ => Finding::fail("xen", format!("Xen {version}"), "remusd knows Xen 4.16 to 4.22; use 4.17"),
    };
    let capabilities = xl.capabilities();
    let has = |name: &str| capabilities.contains(&name);
    let log_dirty = match (has("hvm"), has("hap")) {
        (true, true) => {
            Finding::ok("log-dirty", "hardware-assisted paging: writes of PVH and HVM guests can be logged")
        }
        (true, false) => Finding::fail(
            "log-dirty",
            format!("no hardware-assisted paging ({})", capabilities.join(" ")),
            "switch on nested paging (EPT or NPT) in the firmware, and boot Xen without hap=0",
        ),
        (false, _) => Finding::fail(
            "log-dirty",
            format!("no hardware virtualization ({})", capabilities.join(" ")),
            "switch on VT-x or AMD-V in the firmware",
        ),
    };
    let tools = match probe.run("xl", &["list"]) {
        Some(output) if output.ok => Finding::ok("xl", "xl works"),
        Some(output) => {
            Finding::fail("xl", output.err, "`xl list` must work: is xenstored running (systemctl status xenstored)?")
        }
        None => Finding::fail("xl", "there is no xl", "install xen-utils of the running Xen"),
    };
    vec![found, log_dirty, tools]
}

pub(super) fn helper(probe: &dyn Probe, xl: &XlInfo) -> Finding {
    let path = match (probe.variable("LIBXL_SAVE_HELPER"), xl.version()) {
        (Some(path), _) => path,
        (None, Some(version)) => format!("/usr/lib/xen-{version}/bin/libxl-save-helper"),
        (None, None) => return Finding::fail("save-helper", "which one is not known without Xen's version", "see xen"),
    };
    if probe.exists(&path) {
        return Finding::ok("save-helper", path);
    }
    Finding::fail(
        "save-helper",
        format!("{path} is not there"),
        "install xen-utils of the running Xen, or say with `remusd --save-helper` where it is",
    )
}

pub(super) fn libraries(probe: &dyn Probe, xl: &XlInfo) -> Finding {
    let Some(version) = xl.version() else {
        return Finding::fail("libraries", "which ones is not known without Xen's version", "see xen");
    };
    let known = probe.run("ldconfig", &["-p"]).unwrap_or_default().out;
    let wanted = [format!("libxenctrl.so.{version}"), format!("libxenguest.so.{version}"), "libxenstore.so.4".into()];
    let missing: Vec<_> = wanted.iter().filter(|name| !known.contains(name.as_str())).cloned().collect();
    match missing.is_empty() {
        true => Finding::ok("libraries", wanted.join(", ")),
        false => Finding::fail(
            "libraries",
            format!("{} cannot be found", missing.join(", ")),
            format!("install libxenmisc{version} and libxenstore4: they are locked to the running Xen"),
        ),
    }
}

pub(super) fn xenstore(probe: &dyn Probe) -> Finding {
    match ["/run/xenstored/socket", "/dev/xen/xenbus"].into_iter().find(|path| probe.exists(path)) {
        Some(path) => Finding::ok("xenstore", path),
        None => Finding::fail("xenstore", "neither socket nor device", "systemctl start xenstored"),
    }
}

fn release(probe: &dyn Probe) -> String {
    probe.read("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Whether the running kernel has a module, loaded, built in or in its folder.
pub(super) fn has_module(probe: &dyn Probe, name: &str) -> bool {
    let folder = format!("/lib/modules/{}", release(probe));
    let known: String =
        ["modules.dep", "modules.builtin"].iter().filter_map(|f| probe.read(&format!("{folder}/{f}"))).collect();
    probe.exists(&format!("/sys/module/{name}"))
        || known.contains(&format!("/{name}.ko"))
        || known.contains(&format!("/{}.ko", name.replace('_', "-")))
}

pub(super) fn modules(probe: &dyn Probe) -> Finding {
    let wanted = ["ifb", "sch_ingress", "sch_plug", "cls_matchall", "act_mirred"];
    let missing: Vec<_> = wanted.into_iter().filter(|name| !has_module(probe, name)).collect();
    match missing.is_empty() {
        true => Finding::ok("modules", wanted.join(", ")),
        false => Finding::fail(
            "modules",
            format!("the kernel {} has no {}", release(probe), missing.join(", ")),
            "output cannot be held without: use the distribution's full kernel (not a cloud kernel)",
        ),
    }
}

pub(super) fn memory(probe: &dyn Probe) -> Finding {
    let text = probe.read("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let mib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024;
    match mib {
        1024.. => Finding::ok("memory", format!("{mib} MiB are free in dom0")),
        _ => Finding::warn(
            "memory",
            format!("{mib} MiB are free in dom0"),
            "an epoch is held in dom0's memory: give it more (dom0_mem=) or lower --epoch-budget",
        ),
    }
}

/// Hazard F25: with autoballoon xl holds its lock for as long as a copy is received, and nothing else can be made there.
pub(super) fn balloon(probe: &dyn Probe, xl: &XlInfo) -> Finding {
    let command_line = xl.get("xen_commandline").unwrap_or_default();
    let settings = probe.read("/etc/xen/xl.conf").unwrap_or_default();
    let setting = settings.lines().map(str::trim).find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "autoballoon").then(|| value.trim().trim_matches(['"', '\'']).to_owned())
    });
    let fixed = command_line.split_whitespace().any(|word| word.starts_with("dom0_mem="));
    match (setting.as_deref(), fixed) {
        (Some("off" | "0"), _) => Finding::ok("autoballoon", "off in /etc/xen/xl.conf"),
        (None | Some("auto"), true) => Finding::ok("autoballoon", "off, because dom0_mem= is given"),
        (setting, _) => Finding::fail(
            "autoballoon",
            format!("{}, and no dom0_mem= on Xen's command line", setting.unwrap_or("auto (the default)")),
            "xl would hold its lock for as long as a copy is received, and nothing else could start: boot Xen with dom0_mem=SIZE,max:SIZE \
             or set autoballoon=\"off\" in /etc/xen/xl.conf",
        ),
    }
}

pub(super) fn disk(probe: &dyn Probe) -> Finding {
    const STATE: &str = "/var/lib/remus";
    match probe.free_bytes(STATE).map(|bytes| bytes >> 20) {
        Some(mib @ 64..) => Finding::ok("disk-space", format!("{mib} MiB are free at {STATE}")),
        Some(mib) => {
            Finding::fail("disk-space", format!("{mib} MiB are free at {STATE}"), "state is written there: make room")
        }
        None => Finding::warn("disk-space", format!("{STATE} cannot be looked at"), "run it as root"),
    }
}

pub(super) fn clock(probe: &dyn Probe) -> Finding {
    let told = probe.run("timedatectl", &["show", "-p", "NTPSynchronized", "--value"]);
    let chrony =
        || probe.run("chronyc", &["-n", "tracking"]).is_some_and(|o| o.ok && !o.out.contains("Not synchronised"));
    let synchronized =
        told.is_some_and(|o| o.out.trim() == "yes") || probe.exists("/run/systemd/timesync/synchronized");
    match synchronized || chrony() {
        true => Finding::ok("clock", "synchronized"),
        false => Finding::warn(
            "clock",
            "not known to be synchronized",
            "a guest takes its host's clock: after a failover its time would jump. Run systemd-timesyncd or chrony on both hosts",
        ),
    }
}

/// Bridges of this host.
pub(super) fn bridges(probe: &dyn Probe) -> Vec<String> {
    let mut names = probe.list("/sys/class/net");
    names.retain(|name| probe.exists(&format!("/sys/class/net/{name}/bridge")));
    names
}

pub(super) fn bridge(probe: &dyn Probe) -> Finding {
    match bridges(probe) {
        names if names.is_empty() => Finding::warn(
            "bridge",
            "none",
            "guests with a network need the same bridge on both hosts (interfaces(5): bridge_ports)",
        ),
        names => Finding::ok("bridge", names.join(", ")),
    }
}

pub(super) fn link(probe: &dyn Probe) -> Finding {
    let file = probe.read("/var/lib/remus/tls/peers.json").unwrap_or_default();
    let file: serde_json::Value = serde_json::from_str(&file).unwrap_or_default();
    let peers = file.get("peers").and_then(serde_json::Value::as_array).map_or(0, Vec::len);
    if peers > 0 {
        return Finding::ok("link", format!("paired with {peers} (TLS): `remus peers` shows them"));
    }
    match probe.run("ssh", &["-V"]) {
        Some(_) => Finding::ok("link", "ssh; no host is paired for TLS"),
        None => {
            Finding::fail("link", "no paired host and no ssh", "install openssh-client, or pair with `remus pair HOST`")
        }
    }
}

pub(super) fn daemon(probe: &dyn Probe) -> Finding {
    match probe.exists("/run/remus/remusd.sock") {
        true => Finding::ok("remusd", "running"),
        false => Finding::fail("remusd", "not running (no /run/remus/remusd.sock)", "systemctl enable --now remusd"),
    }
}

/// A guest that a host starts by itself when it boots is a second copy after a failover.
pub(super) fn autostart(probe: &dyn Probe, wanted: Option<&str>) -> Vec<Finding> {
    const FOLDER: &str = "/etc/xen/auto";
    let entries = probe.list(FOLDER);
    if entries.is_empty() {
        return vec![Finding::ok("autostart", format!("nothing in {FOLDER}"))];
    }
    let todo = "after a failover this host would start it again when it boots, and two copies would run: remove the entry of every \
                guest that is to be protected";
    let is = |entry: &String| {
        let named = probe.read(&format!("{FOLDER}/{entry}")).is_some_and(|text| name_in(&text).as_deref() == wanted);
        named || Some(entry.trim_end_matches(".cfg")) == wanted
    };
    match wanted.is_some() && entries.iter().any(is) {
        true => vec![Finding::fail("autostart", format!("{FOLDER} starts {}", wanted.unwrap_or_default()), todo)],
        false => vec![Finding::warn("autostart", format!("{FOLDER} has {}", entries.join(", ")), todo)],
    }
}

/// `name = "web"` of an xl configuration file.
fn name_in(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        (key.trim() == "name").then(|| value.trim().trim_matches(['"', '\'']).to_owned())
    })
}

/// xendomains saves guests when the host goes down and restores them when it comes up: an old copy of what runs elsewhere by then.
pub(super) fn xendomains(probe: &dyn Probe, wanted: Option<&str>) -> Vec<Finding> {
    let Some(settings) = probe.read("/etc/default/xendomains") else {
        return vec![Finding::ok("xendomains", "not installed")];
    };
    let value = |key: &str| {
        let lines = settings.lines().map(str::trim);
        let found = lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).next_back();
        found.map(|value| value.trim_matches(['"', '\'']).to_owned()).unwrap_or_default()
    };
    let folder = value("XENDOMAINS_SAVE");
    if folder.is_empty() || value("XENDOMAINS_RESTORE") != "true" {
        return vec![Finding::ok("xendomains", "saves or restores nothing")];
    }
    let todo = "a restored guest is an old copy of what runs elsewhere by then: set XENDOMAINS_RESTORE=false and XENDOMAINS_SAVE= in \
                /etc/default/xendomains, and remove the saved file";
    match wanted.filter(|name| probe.exists(&format!("{folder}/{name}"))) {
        Some(name) => vec![Finding::fail("xendomains", format!("{folder}/{name} is restored at the next boot"), todo)],
        None => vec![Finding::warn("xendomains", format!("saves guests to {folder} and restores them"), todo)],
    }
}
