//! Against real shell programs.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::device::Kind;

fn device() -> Device {
    Device {
        kind: Kind::Disk,
        domid: 7,
        devid: 51728,
        names: vec!["xvdb".into()],
        params: [("physical-device".to_owned(), "fd:0".to_owned())].into(),
    }
}

fn disk(program: PathBuf) -> ScriptedDisk {
    let (vdev, target) = ("xvdb".into(), "/dev/vg/data".into());
    ScriptedDisk { vdev, program, target, domain: "web".into(), uuid: "0f".into() }
}

fn program(dir: &Path, body: &str) -> PathBuf {
    let path = dir.join("program");
    // Written under another name, so that nobody has it open for writing when it is run.
    std::fs::write(dir.join("new"), format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(dir.join("new"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(dir.join("new"), &path).unwrap();
    path
}

/// Long, since tests may share a slow machine; but for what is to be waited for in vain.
fn limits(paused: Duration) -> ScriptLimits {
    ScriptLimits { slow: LONG, running: LONG, paused }
}

const LONG: Duration = Duration::from_secs(60);

const EPOCH: EpochContext = EpochContext { epoch: 4, armed: true };

#[tokio::test]
async fn phases_are_lines_and_the_environment_says_which_device() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let body = format!(
        "while read line; do echo \"$REMUS_SIDE $REMUS_VDEV $REMUS_TARGET $REMUS_DOMID $REMUS_PARAM_PHYSICAL_DEVICE $line\" >> {}; \
         case $line in match) echo yes;; ready) echo no;; commit*) echo error disk on fire;; *) echo ok;; esac; done",
        log.display()
    );
    let script = Script::new(disk(program(dir.path(), &body)), limits(LONG));
    assert_eq!(script.matches(&device()).await.unwrap(), Match::Yes);
    let mut handle = script.attach(&device());
    handle.setup().await.unwrap();
    assert!(!handle.is_ready().await);
    handle.arm().await.unwrap();
    handle.postsuspend(&EPOCH).await.unwrap();
    handle.preresume(&EPOCH).await.unwrap();
    let error = handle.commit(&EPOCH).await.unwrap_err().to_string();
    assert!(error.contains("commit 4") && error.contains("disk on fire"), "{error}");
    handle.abandon(&EPOCH).await.unwrap();
    handle.teardown(Ending::Discard).await.unwrap();
    handle.teardown(Ending::Discard).await.unwrap();
    let lines = std::fs::read_to_string(log).unwrap();
    let said: Vec<_> = lines.lines().map(|l| l.strip_prefix("primary xvdb /dev/vg/data 7 fd:0 ").unwrap()).collect();
    let care = ["setup", "ready", "arm", "postsuspend 4 armed", "preresume 4", "commit 4", "abandon 4"];
    assert_eq!(said[1..8], care);
    assert_eq!(said[0], "match");
    assert_eq!(said[8..], ["teardown discard", "teardown discard"]);
}

#[tokio::test]
async fn a_program_that_hangs_is_ended_with_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    let body = format!("sleep 600 & echo $$ $! > {}; read line; echo ok; read line; wait", pids.display());
    let script = Script::new(disk(program(dir.path(), &body)), limits(Duration::from_millis(300)));
    let mut handle = script.attach(&device());
    handle.setup().await.unwrap();
    let error = handle.postsuspend(&EPOCH).await.unwrap_err().to_string();
    assert!(error.contains("did not answer"), "{error}");
    let gone = |pid: &str| match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => true,
        // An orphan that nobody has reaped yet.
        Ok(stat) => stat.contains(") Z "),
    };
    let said = std::fs::read_to_string(pids).unwrap();
    for pid in said.split_whitespace() {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !gone(pid) {
            assert!(std::time::Instant::now() < deadline, "process {pid} lives on");
            tokio::task::yield_now().await;
        }
    }
    assert!(handle.commit(&EPOCH).await.unwrap_err().to_string().contains("does not run"));
}

#[tokio::test]
async fn wrong_answers_and_dead_programs_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let script = Script::new(disk(program(dir.path(), "read line; echo maybe")), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("maybe"));
    let script = Script::new(disk(program(dir.path(), "read line; exit 3")), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("ended"));
    let script = Script::new(disk(dir.path().join("missing")), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("missing"));
    let path = program(dir.path(), "read line; echo no");
    let script = Script::new(disk(path.clone()), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("does not take"));
    assert_eq!(script.matches(&Device { names: vec!["xvda".into()], ..device() }).await.unwrap(), Match::No);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("can change it"));
}

/// Both hosts' directories of the example, and a primary and a backup that run it.
struct Pair {
    dir: tempfile::TempDir,
    primary: ScriptedDisk,
    backup: ScriptedDisk,
}

impl Pair {
    /// `peer` runs what the primary wants done on the other host.
    fn new(peer: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/disk-by-copy");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let conf = format!("peer='{peer}'\nstate={}\n", path("state"));
        std::fs::write(path("conf"), conf).unwrap();
        // The example, told where its configuration is.
        let body = format!("REMUS_DISK_BY_COPY_CONF={} exec /bin/sh {example}", path("conf"));
        let program = program(dir.path(), &body);
        let disk = |target: &str| ScriptedDisk { target: path(target), ..disk(program.clone()) };
        let (primary, backup) = (disk("a.img"), disk("b.img"));
        Self { dir, primary, backup }
    }

    fn write(&self, name: &str, byte: u8) {
        std::fs::write(self.dir.path().join(name), vec![byte; 100_000]).unwrap();
    }

    /// The one byte that all of an image consists of.
    fn read(&self, name: &str) -> u8 {
        let bytes = std::fs::read(self.dir.path().join(name)).unwrap();
        assert!(bytes.len() == 100_000 && bytes.iter().all(|b| *b == bytes[0]), "{name} is torn");
        bytes[0]
    }
}

#[tokio::test]
async fn the_example_gives_the_backup_the_epoch_that_it_activates() {
    let pair = Pair::new("sh -c");
    pair.write("a.img", 1);
    pair.write("b.img", 0);
    let limits = limits(LONG);
    let script = Script::new(pair.primary.clone(), limits);
    assert_eq!(script.matches(&device()).await.unwrap(), Match::Yes);
    let mut source = script.attach(&device());
    source.setup().await.unwrap();
    let copies = ScriptStandby::new(vec![pair.backup.clone()], limits);
    copies.accept().await.unwrap();
    assert!(source.is_ready().await);
    source.arm().await.unwrap();
    for epoch in 1..=3 {
        pair.write("a.img", 10 + epoch as u8);
        source.postsuspend(&EpochContext { epoch, armed: true }).await.unwrap();
        // Written after the epoch was closed: not of it.
        pair.write("a.img", 99);
        source.preresume(&EpochContext { epoch, armed: true }).await.unwrap();
        if epoch < 3 {
            copies.hold(epoch).await;
            copies.commit(epoch).await.unwrap();
            source.commit(&EpochContext { epoch, armed: true }).await.unwrap();
        }
    }
    // The third is on its way; the primary dies before the backup has acknowledged it.
    assert_eq!(pair.read("b.img"), 0, "nothing is written before it is activated");
    copies.activate(2).await.unwrap();
    assert_eq!(pair.read("b.img"), 12);
    assert!(copies.activate(7).await.unwrap_err().to_string().contains("write_disk"), "it never had that one");
    source.teardown(Ending::Discard).await.unwrap();
    assert!(copies.release().await.is_empty());
}

#[tokio::test]
async fn an_epoch_that_does_not_arrive_is_not_held() {
    let pair = Pair::new("false");
    pair.write("a.img", 1);
    pair.write("b.img", 0);
    let limits = limits(LONG);
    let mut source = Script::new(pair.primary.clone(), limits).attach(&device());
    source.setup().await.unwrap();
    let copies = ScriptStandby::new(vec![pair.backup.clone()], limits);
    copies.accept().await.unwrap();
    source.postsuspend(&EPOCH).await.unwrap();
    source.preresume(&EPOCH).await.unwrap();
    let held = tokio::time::timeout(Duration::from_millis(700), copies.hold(4)).await;
    assert!(held.is_err(), "held what never came");
    assert!(copies.activate(4).await.is_err());
    source.teardown(Ending::Release).await.unwrap();
    let record = source.record();
    end_protection(&device(), &record, Ending::Release).await.unwrap();
    assert!(end_protection(&device(), &serde_json::json!({"disk": "d0"}), Ending::Release).await.is_err());
}

#[tokio::test]
async fn a_backups_program_that_died_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let body = format!(
        "while read line; do echo \"$REMUS_SIDE $line\" >> {}; case $line in held*) exit 1;; activate*) echo no way;; *) echo ok;; esac; done",
        log.display()
    );
    let copies = ScriptStandby::new(vec![disk(program(dir.path(), &body))], limits(LONG));
    copies.accept().await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(400), copies.hold(1)).await.is_err());
    copies.commit(1).await.unwrap();
    let error = copies.activate(1).await.unwrap_err().to_string();
    assert!(error.contains("xvdb") && error.contains("no way"), "{error}");
    assert!(copies.release().await.is_empty());
    let said = std::fs::read_to_string(log).unwrap();
    assert!(said.starts_with("backup accept\nbackup held 1\n"), "{said}");
    assert!(said.ends_with("backup commit 1\nbackup activate 1\nbackup release\n"), "{said}");
}
