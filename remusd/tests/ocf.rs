//! The OCF resource agent, with a `remus` and a `crm_node` that say what a test wants.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

struct Cluster(tempfile::TempDir);

impl Cluster {
    /// `rows` is what `remus --json status` says; empty for a guest that it does not know.
    fn new(rows: &str) -> Self {
        let it = Self(tempfile::tempdir().unwrap());
        it.says(rows);
        let remus = "cd \"$(dirname \"$0\")\"; echo \"$*\" >>asked
            case \"$*\" in
            *status*) [ -e dead ] && { echo 'remus: remusd does not run' >&2; exit 1; }
                [ -s rows ] || { echo 'remus: g is neither protected by nor backed up on this host' >&2; exit 1; }
                cat rows ;;
            *) [ -e refuse ] && { echo 'remus: no such guest' >&2; exit 1; }; exit 0 ;;
            esac";
        it.program("remus", remus);
        it.program("crm_node", "case $1 in -n) echo beta ;; -p) echo delta beta alpha ;; esac");
        it
    }

    fn says(&self, rows: &str) {
        std::fs::write(self.0.path().join("rows"), rows).unwrap();
    }

    fn program(&self, name: &str, body: &str) {
        let new = self.0.path().join("new");
        std::fs::write(&new, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(new, self.0.path().join(name)).unwrap();
    }

    fn run(&self, action: &str, parameters: &[(&str, &str)]) -> Output {
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/ocf/remus");
        let mut command = Command::new(agent);
        command.arg(action).env("OCF_ROOT", "/nonexistent");
        command.env("PATH", format!("{}:/usr/bin:/bin", self.0.path().display()));
        command.env("OCF_RESKEY_remus", self.0.path().join("remus"));
        for (name, value) in parameters {
            command.env(format!("OCF_RESKEY_{name}"), value);
        }
        command.output().unwrap()
    }

    fn code(&self, action: &str, parameters: &[(&str, &str)]) -> i32 {
        self.run(action, parameters).status.code().unwrap()
    }

    fn asked(&self) -> String {
        std::fs::read_to_string(self.0.path().join("asked")).unwrap_or_default()
    }
}

const G: (&str, &str) = ("domain", "g");

fn row(role: &str, state: &str, protected: bool) -> String {
    format!(
        "[\n  {{\n  \"domain\": \"g\", \"role\": \"{role}\", \"state\": \"{state}\", \"protected\": {protected}, \"detail\": \"x\"\n  }}\n]\n"
    )
}

#[test]
fn monitoring_tells_protected_trying_and_not_running_apart() {
    let cluster = Cluster::new(&row("primary", "protected", true));
    assert_eq!(cluster.code("monitor", &[G]), 0);
    for trying in ["syncing", "first-copy", "guest-stuck", "arbitrating"] {
        cluster.says(&row("primary", trying, false));
        assert_eq!(cluster.code("monitor", &[G]), 190, "{trying}");
    }
    for over in ["unprotected", "stopped", "guest-ended", "superseded", "handed-over", "not-started"] {
        cluster.says(&row("primary", over, false));
        assert_eq!(cluster.code("monitor", &[G]), 7, "{over}");
    }
    // What this host holds for another one is that one's resource.
    cluster.says(&row("backup", "armed", true));
    assert_eq!(cluster.code("monitor", &[G]), 7);
    cluster.says("");
    assert_eq!(cluster.code("monitor", &[G]), 7);
    std::fs::write(cluster.0.path().join("dead"), "").unwrap();
    assert_eq!(cluster.code("monitor", &[G]), 1, "a daemon that does not answer is not a guest that is not protected");
}

#[test]
fn start_protects_once_to_the_other_host_or_the_next_one_in_the_ring() {
    let cluster = Cluster::new("");
    let options = ("options", "--witness configured");
    assert_eq!(cluster.code("start", &[G, ("host", "beta alpha"), options]), 0);
    assert!(cluster.asked().contains("protect g alpha --witness configured\n"), "{}", cluster.asked());
    assert_eq!(cluster.code("start", &[G]), 0);
    assert!(cluster.asked().contains("protect g delta\n"), "after beta comes delta: {}", cluster.asked());
    cluster.program("crm_node", "case $1 in -n) echo delta ;; -p) echo delta beta alpha ;; esac");
    assert_eq!(cluster.code("start", &[G]), 0);
    assert!(cluster.asked().contains("protect g alpha\n"), "after the last comes the first: {}", cluster.asked());

    let before = cluster.asked().matches("protect g").count();
    for there in [row("primary", "protected", true), row("primary", "syncing", false)] {
        cluster.says(&there);
        assert_eq!(cluster.code("start", &[G]), 0);
    }
    assert_eq!(
        cluster.asked().matches("protect g").count(),
        before,
        "what is there, or on its way, is not asked for again"
    );
    cluster.says("");
    std::fs::write(cluster.0.path().join("refuse"), "").unwrap();
    let refused = cluster.run("start", &[G]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no such guest"));
}

#[test]
fn stop_ends_what_is_there_and_is_content_with_nothing() {
    let cluster = Cluster::new(&row("primary", "protected", true));
    assert_eq!(cluster.code("stop", &[G]), 0);
    assert!(cluster.asked().contains("unprotect g\n"));
    let cluster = Cluster::new("");
    assert_eq!(cluster.code("stop", &[G]), 0);
    assert!(!cluster.asked().contains("unprotect"));
    let cluster = Cluster::new(&row("primary", "protected", true));
    std::fs::write(cluster.0.path().join("refuse"), "").unwrap();
    assert_eq!(cluster.code("stop", &[G]), 1, "a protection that goes on is not stopped");
}

#[test]
fn what_is_wrong_with_the_configuration_has_its_own_code() {
    let cluster = Cluster::new("");
    assert_eq!(cluster.code("validate-all", &[G]), 0);
    assert_eq!(cluster.code("validate-all", &[]), 6);
    assert_eq!(cluster.code("start", &[G, ("host", "beta")]), 6);
    std::fs::remove_file(cluster.0.path().join("remus")).unwrap();
    assert_eq!(cluster.code("monitor", &[G]), 5);
    assert_eq!(cluster.code("promote", &[G]), 3);
    let metadata = String::from_utf8(cluster.run("meta-data", &[]).stdout).unwrap();
    for action in ["start", "stop", "monitor", "validate-all", "meta-data"] {
        assert!(metadata.contains(&format!("<action name=\"{action}\"")), "{metadata}");
    }
}
