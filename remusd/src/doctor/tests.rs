use std::collections::HashMap;

use super::*;
use crate::cli::render::Paint;

/// A host made of files and programs.
#[derive(Clone, Default)]
struct Fake {
    files: HashMap<String, String>,
    programs: HashMap<String, Output>,
    user: u32,
    free: u64,
    now: u64,
}

impl Probe for Fake {
    fn read(&self, path: &str) -> Option<String> {
        self.files.get(path).cloned()
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let names =
            self.files.keys().filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/')?.split('/').next());
        let mut names: Vec<_> = names.map(str::to_owned).collect();
        names.sort();
        names.dedup();
        names
    }

    fn exists(&self, path: &str) -> bool {
        self.files.keys().any(|file| file.starts_with(path))
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Option<Output> {
        self.programs.get(format!("{program} {}", arguments.join(" ")).trim()).cloned()
    }

    fn variable(&self, _: &str) -> Option<String> {
        None
    }

    fn user(&self) -> u32 {
        self.user
    }

    fn free_bytes(&self, _: &str) -> Option<u64> {
        Some(self.free)
    }

    fn now_ms(&self) -> u64 {
        self.now
    }
}

impl Fake {
    fn file(mut self, path: &str, text: &str) -> Self {
        self.files.insert(path.into(), text.into());
        self
    }

    fn without(mut self, path: &str) -> Self {
        assert!(self.files.remove(path).is_some(), "{path}");
        self
    }

    fn says(mut self, command: &str, out: &str) -> Self {
        self.programs.insert(command.into(), Output { ok: true, out: out.into(), err: String::new() });
        self
    }

    fn fails(mut self, command: &str, err: &str) -> Self {
        self.programs.insert(command.into(), Output { ok: false, out: String::new(), err: err.into() });
        self
    }
}

const XL_INFO: &str = "host : hosta\nxen_major : 4\nxen_minor : 17\nvirt_caps : pv hvm hvm_directio pv_directio hap gnttab-v1\n\
     hw_caps : 178bf3ff:f6f83203\nfree_memory : 2048\nxen_commandline : placeholder dom0_mem=1280M,max:1280M loglvl=warning\n";

const GUESTS: &str = r#"[
    {"domid": 0, "config": {"c_info": {"name": "Domain-0", "type": "pv"}}},
    {"domid": 1, "config": {"c_info": {"name": "web", "type": "pvh"}, "b_info": {"max_memkb": 262144, "target_memkb": 262144},
        "nics": [{"devid": 0, "bridge": "xenbr0"}]}},
    {"domid": 2, "config": {"c_info": {"name": "old", "type": "pv"}, "b_info": {"max_memkb": 524288, "target_memkb": 262144},
        "disks": [{"vdev": "xvda", "readwrite": 1}, {"vdev": "hdc", "readwrite": 0, "is_cdrom": 1}],
        "pcidevs": [{"dev": 1}]}}
]"#;

/// A host that has everything.
fn host() -> Fake {
    let fake = Fake { free: 10 << 30, now: 1_000_000, ..Fake::default() };
    fake.file("/proc/sys/kernel/hostname", "hosta\n")
        .file("/proc/sys/kernel/osrelease", "6.1.0\n")
        .file("/proc/xen/capabilities", "control_d\n")
        .file("/proc/meminfo", "MemTotal: 4000000 kB\nMemAvailable:    2097152 kB\n")
        .file("/usr/lib/xen-4.17/bin/libxl-save-helper", "")
        .file("/run/xenstored/socket", "")
        .file("/run/remus/remusd.sock", "")
        .file(
            "/lib/modules/6.1.0/modules.dep",
            "kernel/net/sched/sch_plug.ko: \nkernel/net/sched/cls_matchall.ko.xz:\nkernel/net/sched/act_mirred.ko:\n",
        )
        .file("/lib/modules/6.1.0/modules.builtin", "kernel/net/sched/sch_ingress.ko\n")
        .file("/sys/module/ifb/refcnt", "0")
        .file("/sys/class/net/xenbr0/bridge/bridge_id", "")
        .says("xl info", XL_INFO)
        .says("xl list", "")
        .says("xl list -l", GUESTS)
        .says("ldconfig -p", "libxenctrl.so.4.17\nlibxenguest.so.4.17\nlibxenstore.so.4\n")
        .says("timedatectl show -p NTPSynchronized --value", "yes\n")
        .says("ssh -V", "")
}

fn verdict(fake: &Fake, check: &str) -> Verdict {
    let report = examine(fake, None);
    let found: Vec<_> = report.findings.iter().filter(|f| f.check == check).collect();
    assert_eq!(found.len(), 1, "{check}: {:?}", report.findings);
    if found[0].verdict != Verdict::Ok {
        assert!(found[0].todo.as_ref().is_some_and(|todo| !todo.is_empty()), "says what to do: {:?}", found[0]);
    }
    found[0].verdict
}

#[test]
fn a_host_that_has_everything_is_ready() {
    let report = examine(&host(), Some("web"));
    let bad: Vec<_> = report.findings.iter().filter(|f| f.verdict != Verdict::Ok).collect();
    assert!(bad.is_empty(), "{bad:?}");
    assert_eq!(report.worst(Some("web")), Verdict::Ok);
    insta::assert_snapshot!(text(&[report], &[], Paint(false)));
}

#[test]
fn every_lack_is_found() {
    let info = |from: &str, to: &str| host().says("xl info", &XL_INFO.replace(from, to));
    let rows: Vec<(&str, Fake, Verdict)> = vec![
        ("privileges", Fake { user: 1000, ..host() }, Verdict::Fail),
        ("dom0", host().without("/proc/xen/capabilities"), Verdict::Fail),
        ("dom0", host().file("/proc/xen/capabilities", ""), Verdict::Fail),
        ("xen", info("xen_minor : 17", "xen_minor : 18"), Verdict::Warn),
        ("xen", info("xen_minor : 17", "xen_minor : 8"), Verdict::Fail),
        ("xen", host().fails("xl info", "Permission denied"), Verdict::Fail),
        ("log-dirty", info(" hap ", " "), Verdict::Fail),
        ("log-dirty", info(" hvm ", " "), Verdict::Fail),
        ("xl", host().fails("xl list", "no xenstore"), Verdict::Fail),
        ("save-helper", host().without("/usr/lib/xen-4.17/bin/libxl-save-helper"), Verdict::Fail),
        ("libraries", host().says("ldconfig -p", "libxenctrl.so.4.16"), Verdict::Fail),
        ("xenstore", host().without("/run/xenstored/socket"), Verdict::Fail),
        ("modules", host().without("/sys/module/ifb/refcnt"), Verdict::Fail),
        ("modules", host().without("/lib/modules/6.1.0/modules.builtin"), Verdict::Fail),
        ("memory", host().file("/proc/meminfo", "MemAvailable: 500000 kB"), Verdict::Warn),
        ("autoballoon", info("dom0_mem=1280M,max:1280M", ""), Verdict::Fail),
        (
            "autoballoon",
            info("dom0_mem=1280M,max:1280M", "").file("/etc/xen/xl.conf", "autoballoon=\"off\""),
            Verdict::Ok,
        ),
        ("autoballoon", host().file("/etc/xen/xl.conf", "autoballoon=\"on\""), Verdict::Fail),
        ("disk-space", Fake { free: 1 << 20, ..host() }, Verdict::Fail),
        ("clock", host().says("timedatectl show -p NTPSynchronized --value", "no"), Verdict::Warn),
        ("bridge", host().without("/sys/class/net/xenbr0/bridge/bridge_id"), Verdict::Warn),
        ("remusd", host().without("/run/remus/remusd.sock"), Verdict::Fail),
        ("autostart", host().file("/etc/xen/auto/web.cfg", "name = \"web\""), Verdict::Warn),
        (
            "xendomains",
            host().file("/etc/default/xendomains", "XENDOMAINS_SAVE=/var/lib/xen/save\nXENDOMAINS_RESTORE=true\n"),
            Verdict::Warn,
        ),
        (
            "xendomains",
            host().file("/etc/default/xendomains", "XENDOMAINS_SAVE=\"\"\nXENDOMAINS_RESTORE=true\n"),
            Verdict::Ok,
        ),
    ];
    for (check, fake, expected) in rows {
        assert_eq!(verdict(&host(), check), Verdict::Ok, "{check}");
        assert_eq!(verdict(&fake, check), expected, "{check}");
    }
    let mut alone = host();
    alone.programs.remove("ssh -V");
    assert_eq!(verdict(&alone, "link"), Verdict::Fail);
    assert_eq!(
        verdict(&alone.file("/var/lib/remus/tls/peers.json", r#"{"version":1,"peers":[{}]}"#), "link"),
        Verdict::Ok
    );
}

#[test]
fn a_machine_without_xen_is_told_so_and_nothing_panics() {
    let report = examine(&Fake::default(), None);
    assert_eq!(report.worst(None), Verdict::Fail);
    assert!(report.guests.is_empty());
}

#[test]
fn traps_for_the_guest_that_is_to_be_protected_are_failures() {
    let auto = host().file("/etc/xen/auto/10-x.cfg", "name = 'web'\n");
    assert_eq!(examine(&auto, Some("web")).worst(Some("web")), Verdict::Fail);
    assert_eq!(examine(&auto, Some("other")).worst(Some("other")), Verdict::Warn);
    let saved =
        host().file("/etc/default/xendomains", "XENDOMAINS_SAVE=/s\nXENDOMAINS_RESTORE=true\n").file("/s/web", "");
    assert_eq!(examine(&saved, Some("web")).worst(Some("web")), Verdict::Fail);
}

#[test]
fn a_guest_that_cannot_be_protected_counts_when_it_is_asked_for() {
    let report = examine(&host(), None);
    assert_eq!(report.guests.len(), 2, "not dom0");
    assert_eq!(report.worst(None), Verdict::Ok, "nobody asked for it");
    let report = examine(&host(), Some("old"));
    assert_eq!(report.worst(Some("old")), Verdict::Fail);
    insta::assert_snapshot!(text(&[Report { findings: vec![], ..report }], &[], Paint(false)));
}

#[test]
fn two_hosts_must_agree() {
    let here = examine(&host(), None);
    let worst = |there: &Report, asked| {
        let found = compare(&here, there, asked, Some("web"));
        let bad: Vec<_> = found.iter().filter(|f| f.verdict != Verdict::Ok).map(|f| f.check.clone()).collect();
        (found.iter().map(|f| f.verdict).max().unwrap(), bad.join(" "))
    };
    let now = (999_950, 1_000_050);
    let other = |change: &dyn Fn(&mut Facts)| {
        let mut there = here.clone();
        change(&mut there.facts);
        there
    };
    assert_eq!(worst(&here, now), (Verdict::Ok, String::new()));
    let rows: Vec<(Report, Verdict, &str)> = vec![
        (other(&|f| f.xen = Some("4.16".into())), Verdict::Fail, "peer-xen"),
        (other(&|f| f.xen = Some("4.20".into())), Verdict::Warn, "peer-xen"),
        (other(&|f| f.xen = None), Verdict::Fail, "peer-xen"),
        (other(&|f| f.processor = None), Verdict::Warn, "peer-processor"),
        (other(&|f| f.remus = "0.0.1".into()), Verdict::Warn, "peer-remusd"),
        (other(&|f| f.time_ms += 5000), Verdict::Warn, "peer-clock"),
        (other(&|f| f.time_ms -= 5000), Verdict::Warn, "peer-clock"),
        (other(&|f| f.bridges.clear()), Verdict::Fail, "peer-bridge"),
        (other(&|f| f.free_memory_mib = Some(100)), Verdict::Fail, "peer-memory"),
    ];
    for (there, verdict, check) in rows {
        assert_eq!(worst(&there, now), (verdict, check.to_owned()));
    }
    let slow = other(&|f| f.time_ms += 3000);
    assert_eq!(worst(&slow, (999_000, 1_003_000)).0, Verdict::Ok, "within what asking took");
    assert_eq!(unreachable("hostb", "no route").verdict, Verdict::Fail);
}

/// A host with a mirrored disk as its service describes it, and a guest on it.
fn mirrored(status: &serde_json::Value) -> Fake {
    let guests = r#"[{"domid": 1, "config": {"c_info": {"name": "web", "type": "pvh"},
        "disks": [{"vdev": "xvda", "readwrite": 1, "pdev_path": "/dev/remus/d0", "backend": "phy"}]}}]"#;
    let modules = "kernel/net/sched/sch_plug.ko:\nkernel/net/sched/cls_matchall.ko:\nkernel/net/sched/act_mirred.ko:\nkernel/drivers/block/nbd.ko:\n";
    host()
        .file("/etc/remus/disk/d0.env", "")
        .file("/lib/modules/6.1.0/modules.dep", modules)
        .file("/sys/module/xen_blkback/parameters/feature_persistent", "N\n")
        .says("xl list -l", guests)
        .says("remus-disk ctl d0 status", &status.to_string())
}

fn source() -> serde_json::Value {
    let size = 48 << 20;
    serde_json::json!({ "name": "d0", "role": "source", "open": true, "connected": true, "in_sync": true, "size": size, "block": 512 })
}

#[test]
fn what_is_wrong_with_a_mirrored_disk_is_said() {
    let well = mirrored(&source());
    let report = examine(&well, Some("web"));
    assert!(report.findings.iter().chain(&report.guests[0].findings).all(|f| f.verdict == Verdict::Ok), "{report:?}");
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut status = source();
        change(&mut status);
        mirrored(&status)
    };
    let target = |good: bool| mirrored(&serde_json::json!({ "name": "d0", "role": "target", "good": good }));
    let rows = [
        ("nbd", well.clone().file("/lib/modules/6.1.0/modules.dep", ""), Verdict::Fail),
        ("blkback", well.clone().file("/sys/module/xen_blkback/parameters/feature_persistent", "Y\n"), Verdict::Warn),
        ("blkback", well.clone().without("/sys/module/xen_blkback/parameters/feature_persistent"), Verdict::Warn),
        (
            "blkback",
            well.clone()
                .without("/sys/module/xen_blkback/parameters/feature_persistent")
                .file("/etc/modprobe.d/remus.conf", "options xen_blkback feature_persistent=0\n"),
            Verdict::Ok,
        ),
        ("mirrored-disk", well.clone().fails("remus-disk ctl d0 status", "does the service run?"), Verdict::Fail),
        ("mirrored-disk", with(&|s| s["open"] = false.into()), Verdict::Warn),
        ("mirrored-disk", with(&|s| (s["connected"], s["via"]) = (false.into(), "ssh b".into())), Verdict::Fail),
        ("mirrored-disk", with(&|s| s["connected"] = false.into()), Verdict::Ok),
        ("mirrored-disk", with(&|s| s["in_sync"] = false.into()), Verdict::Warn),
        ("mirrored-disk", with(&|s| s["sync_stuck"] = 4096.into()), Verdict::Fail),
        ("mirrored-disk", with(&|s| s["role"] = "none".into()), Verdict::Warn),
        ("mirrored-disk", target(true), Verdict::Ok),
        ("mirrored-disk", target(false), Verdict::Warn),
    ];
    for (check, fake, expected) in rows {
        assert_eq!(verdict(&fake, check), expected, "{check}: {:?}", examine(&fake, None).findings);
    }
    let cached = GUESTS
        .replace("\"readwrite\": 1", "\"readwrite\": 1, \"pdev_path\": \"/dev/remus/d0\", \"backend\": \"qdisk\"");
    let report = examine(&well.says("xl list -l", &cached), Some("old"));
    assert!(report.guests[0].findings.iter().any(|f| f.check == "disks" && f.verdict == Verdict::Fail), "{report:?}");
}

#[test]
fn both_hosts_disks_must_be_alike() {
    let here = examine(&mirrored(&source()), None);
    let found = |there: &serde_json::Value| {
        let there = examine(&mirrored(there), None);
        let found = compare(&here, &there, (999_950, 1_000_050), Some("web"));
        let disk: Vec<_> = found.into_iter().filter(|f| f.check == "peer-disk").collect();
        assert_eq!(disk.len(), 1, "{disk:?}");
        disk[0].clone()
    };
    let copy = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut status = source();
        status["role"] = "target".into();
        change(&mut status);
        status
    };
    assert_eq!(found(&copy(&|_| ())).verdict, Verdict::Ok);
    for (there, word) in [
        (copy(&|s| s["size"] = (1 << 20).into()), "bytes here"),
        (copy(&|s| s["block"] = 4096.into()), "blocks of"),
        (source(), "both hosts"),
    ] {
        let finding = found(&there);
        assert!(finding.verdict == Verdict::Fail && finding.found.contains(word), "{finding:?}");
    }
    let bare = examine(&host(), None);
    let missing = compare(&here, &bare, (999_950, 1_000_050), None);
    assert!(missing.iter().any(|f| f.check == "peer-disk" && f.found.contains("not set up")), "{missing:?}");
}
