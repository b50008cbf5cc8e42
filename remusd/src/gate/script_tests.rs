//! The hotplug script with stand-ins for xenstore, tc and the script behind it; the real ones are met on nested hosts.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::install::SCRIPT;
use super::list::{Entry, FOLDER, GateList};
use crate::ids::ProtectionId;

/// xenstore is a folder of files; tc keeps its seals as files and logs what it is asked; the script behind logs its turn.
struct Host {
    dir: tempfile::TempDir,
}

const UUID: ProtectionId = ProtectionId::from_u128(0x1234);

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        for folder in ["bin", "scripts", "store", "sealed", FOLDER] {
            fs::create_dir(host.path(folder)).unwrap();
        }
        let root = host.dir.path().display().to_string();
        host.program("bin/xenstore-read", &format!("cat \"{root}/store/$(echo \"$1\" | tr / _)\""));
        host.program("bin/xenstore-write", &format!("echo \"write $*\" >>{root}/log"));
        host.program("bin/logger", ":");
        host.program("bin/ip", &format!("[ -e {root}/links/$4 ] || [ ! -e {root}/links ]"));
        host.program(
            "bin/tc",
            &format!(
                "case \"$1 $2\" in\n'filter show') [ ! -e {root}/sealed/$4 ] || echo ' action order 1: gact action drop' ;;\n\
                 'filter add') [ ! -e {root}/refuse ] || exit 2; echo \"seal $4 $*\" >>{root}/log; : >{root}/sealed/$4 ;;\n\
                 'qdisc add') [ ! -e {root}/sealed/$4 ] || exit 2 ;; esac"
            ),
        );
        host.program("scripts/vif-bridge", &format!("echo \"bridge $*\" >>{root}/log"));
        host.program("scripts/vif-nat", &format!("echo \"nat $*\" >>{root}/log"));
        host.program("scripts/vif-remus", SCRIPT.strip_prefix("#!/bin/sh\n").unwrap());
        symlink("vif-remus", host.path("scripts/vif-remus-nat")).unwrap();
        symlink("vif-remus", host.path("scripts/vif-remus-gone")).unwrap();
        for (path, value) in [
            ("/local/domain/7/vm", format!("/vm/{UUID}")),
            ("/local/domain/7/name", "g--incoming".into()),
            ("/local/domain/0/backend/vif/7/0/mac", "00:16:3E:00:00:0a".into()),
            ("/local/domain/8/vm", "/vm/00000000-0000-0000-0000-000000000008".into()),
            ("/local/domain/8/name", "other".into()),
        ] {
            fs::write(host.path("store").join(path.replace('/', "_")), format!("{value}\n")).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn guard(&self, uuid: ProtectionId, name: &str, macs: &[&str]) {
        let macs = macs.iter().map(|mac| (*mac).to_owned()).collect();
        GateList::new(self.dir.path()).guard(&Entry { uuid, name: name.into(), macs, why: "test".into() }).unwrap();
    }

    /// Runs the script as libxl does for a device of a domain; what happened, in order.
    fn run(&self, script: &str, args: &[&str], domid: u32) -> (Output, Vec<String>) {
        let _ = fs::remove_file(self.path("log"));
        let output = Command::new(self.path("scripts").join(script))
            .args(args)
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", self.path("bin").display()))
            .env("REMUS_GATE_DIR", self.path(FOLDER))
            .env("XENBUS_PATH", format!("/local/domain/0/backend/vif/{domid}/0"))
            .env("vif", format!("vif{domid}.0"))
            .env("INTERFACE", format!("vif{domid}.0-emu"))
            .output()
            .unwrap();
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        (output, log.lines().map(str::to_owned).collect())
    }

    fn sealed(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(self.path("sealed")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn seals_first(log: &[String], vif: &str, then: &str) -> bool {
    log.len() == 2 && log[0].starts_with(&format!("seal {vif} ")) && log[1] == then
}

#[test]
fn a_guarded_domain_is_sealed_before_the_other_script_has_its_turn() {
    let host = Host::new();
    host.guard(UUID, "whatever", &[]);
    let (output, log) = host.run("vif-remus", &["online", "type_if=vif"], 7);
    assert!(output.status.success());
    assert!(seals_first(&log, "vif7.0", "bridge online type_if=vif"), "{log:?}");
    let rule = "filter add dev vif7.0 ingress pref 1 protocol all matchall action drop";
    assert!(log[0].ends_with(rule), "the daemon's own seal, at its place: {log:?}");
    let (_, log) = host.run("vif-remus-nat", &["add", "type_if=tap"], 7);
    assert!(seals_first(&log, "vif7.0-emu", "nat add type_if=tap"), "{log:?}");
    // Told twice: sealed once.
    let (output, log) = host.run("vif-remus", &["online", "type_if=vif"], 7);
    assert!(output.status.success() && log == ["bridge online type_if=vif"], "{log:?}");
    assert_eq!(host.sealed(), ["vif7.0", "vif7.0-emu"]);
}

#[test]
fn a_copy_with_another_uuid_is_known_by_its_name_or_address() {
    for (name, macs) in [("g", vec![]), ("x", vec!["00:16:3e:00:00:0a"])] {
        let host = Host::new();
        host.guard(ProtectionId::from_u128(9), "y", &["00:16:3e:ff:ff:ff"]);
        host.guard(ProtectionId::from_u128(5), name, &macs);
        let (_, log) = host.run("vif-remus", &["online"], 7);
        assert!(seals_first(&log, "vif7.0", "bridge online"), "{name}: {log:?}");
        let (_, log) = host.run("vif-remus", &["online"], 8);
        assert_eq!(log, ["bridge online"], "another guest is left alone");
    }
}

#[test]
fn nobody_is_sealed_who_is_not_guarded_and_nothing_is_done_when_it_goes() {
    let host = Host::new();
    let (output, log) = host.run("vif-remus", &["online"], 7);
    assert!(output.status.success() && log == ["bridge online"]);
    host.guard(UUID, "g", &[]);
    let (_, log) = host.run("vif-remus", &["offline"], 7);
    assert_eq!(log, ["bridge offline"]);
    fs::write(host.path(FOLDER).join(format!("{UUID}.new")), "name other\n").unwrap();
    let (_, log) = host.run("vif-remus", &["online"], 8);
    assert_eq!(log, ["bridge online"], "an entry that is being written is none");
}

#[test]
fn a_renamed_interface_is_sealed_by_its_name() {
    let host = Host::new();
    host.guard(UUID, "g", &[]);
    fs::create_dir(host.path("links")).unwrap();
    fs::write(host.path("links/web"), "").unwrap();
    fs::write(host.path("store/_local_domain_0_backend_vif_7_0_vifname"), "web\n").unwrap();
    let (_, log) = host.run("vif-remus", &["online"], 7);
    assert!(seals_first(&log, "web", "bridge online"), "{log:?}");
}

#[test]
fn what_cannot_be_sealed_or_known_gets_no_interface_and_says_so() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil); 3] = [
        ("cannot be sealed", |root| fs::write(root.join("refuse"), "").unwrap()),
        ("cannot read in xenstore", |root| fs::remove_file(root.join("store/_local_domain_7_vm")).unwrap()),
        ("there is no", |root| fs::remove_file(root.join("scripts/vif-bridge")).unwrap()),
    ];
    for (text, spoil) in cases {
        let host = Host::new();
        host.guard(UUID, "g", &[]);
        spoil(host.dir.path());
        let (output, log) = host.run("vif-remus", &["online"], 7);
        assert!(!output.status.success(), "{text}");
        let told = log.last().unwrap();
        assert!(told.starts_with("write /local/domain/0/backend/vif/7/0/hotplug-error"), "{log:?}");
        assert!(told.contains(text) && told.ends_with("hotplug-status error"), "{log:?}");
        assert!(!log.iter().any(|line| line.starts_with("bridge")), "{log:?}");
    }
}
