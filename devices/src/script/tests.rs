//! Against real shell programs.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::device::Kind;

fn device() -> Device {
    Device {
        kind: Kind::Disk,
        domid: 7,
        devid: 51712,
        names: vec!["xvda".into()],
        params: [("physical-device".to_owned(), "fd:0".to_owned())].into(),
    }
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
        "while read line; do echo \"$REMUS_KIND $REMUS_DOMID $REMUS_PARAM_PHYSICAL_DEVICE $line\" >> {}; \
         case $line in match) echo yes;; commit*) echo error disk on fire;; *) echo ok;; esac; done",
        log.display()
    );
    let script = Script::new(Kind::Disk, program(dir.path(), &body), limits(LONG));
    assert_eq!(script.matches(&device()).await.unwrap(), Match::Yes);
    let mut handle = script.attach(&device());
    handle.setup().await.unwrap();
    handle.arm().await.unwrap();
    handle.postsuspend(&EPOCH).await.unwrap();
    handle.preresume(&EPOCH).await.unwrap();
    handle.confirm(&EPOCH).await.unwrap();
    let error = handle.commit(&EPOCH).await.unwrap_err().to_string();
    assert!(error.contains("commit 4") && error.contains("disk on fire"), "{error}");
    handle.abandon(&EPOCH).await.unwrap();
    handle.teardown(Ending::Discard).await.unwrap();
    handle.teardown(Ending::Discard).await.unwrap();
    let lines = std::fs::read_to_string(log).unwrap();
    let said: Vec<_> = lines.lines().map(|l| l.strip_prefix("vbd 7 fd:0 ").unwrap()).collect();
    let care = ["setup", "arm", "postsuspend 4 armed", "preresume 4", "confirm 4", "commit 4", "abandon 4"];
    assert_eq!(said[1..8], care);
    assert_eq!(said[0], "match");
    assert_eq!(said[8..], ["teardown discard", "teardown discard"]);
}

#[tokio::test]
async fn a_program_that_hangs_is_ended_with_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    let body = format!("sleep 600 & echo $$ $! > {}; read line; echo ok; read line; wait", pids.display());
    let script = Script::new(Kind::Disk, program(dir.path(), &body), limits(Duration::from_millis(300)));
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
    let script = Script::new(Kind::Disk, program(dir.path(), "read line; echo maybe"), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("maybe"));
    let script = Script::new(Kind::Disk, program(dir.path(), "read line; exit 3"), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("ended"));
    let script = Script::new(Kind::Disk, dir.path().join("missing"), limits(LONG));
    assert!(script.matches(&device()).await.unwrap_err().to_string().contains("missing"));
}
