//! `remus pair` and its kin as typed, with `remusd pair` behind a command in ssh's place: real programs, sockets and TLS. Only the two
//! daemons are stand-ins that have keys and listen, because a whole one needs Xen.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Output;
use std::sync::Arc;

use remusd::link::tls::{Limits, ListenState, listen};
use remusd::pair::{HostId, Keyring, Pairing, rotate, socket};
use serde_json::Value;
use tokio::process::Command;
use tokio::sync::watch;

struct Host {
    folder: tempfile::TempDir,
    keyring: Arc<Keyring>,
}

impl Host {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keyring = Keyring::open(&folder.path().join("tls"), HostId::random()).unwrap();
        // Free a moment ago; peers must know it before anybody listens.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (state, listening) = watch::channel(ListenState::Off);
        let (ring, answering) = (keyring.clone(), keyring.clone());
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        tokio::spawn(listen(address, ring, Limits::default(), state, move |arrived| {
            let keyring = answering.clone();
            async move { rotate::answer(&keyring, arrived).await }
        }));
        let host = Self { folder, keyring };
        let listener = socket::listen(&socket::beside(&host.control())).await.unwrap();
        let pairing = Pairing { keyring: host.keyring.clone(), port, listening };
        tokio::spawn(socket::serve(listener, Ok(Arc::new(pairing))));
        host
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("remusd.sock")
    }

    /// A command that stands for `ssh`: whatever host it is told, this one's `remusd pair` answers.
    fn ssh_to(&self) -> String {
        let path = self.folder.path().join("ssh");
        let script = format!(
            "#!/bin/sh\nexport SSH_CONNECTION='127.0.0.1 50000 127.0.0.1 22'\nexec {} pair --socket {}\n",
            env!("CARGO_BIN_EXE_remusd"),
            self.control().display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        path.display().to_string()
    }

    async fn remus(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_remus"))
            .arg("--socket")
            .arg(self.control())
            .args(arguments)
            .kill_on_drop(true)
            .output()
            .await
            .unwrap()
    }

    async fn remus_json(&self, arguments: &[&str]) -> Value {
        let output = self.remus(&[arguments, &["--json"]].concat()).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}");
        serde_json::from_str::<Value>(&text).unwrap()["result"].clone()
    }

    async fn fingerprint(&self) -> String {
        self.remus_json(&["keys", "show"]).await["fingerprint"].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn hosts_are_paired_listed_rotated_and_unpaired() {
    let (a, b) = (Host::start().await, Host::start().await);
    let ssh = b.ssh_to();
    let pair = ["pair", "root@hostb", "-s", &ssh, "--address", "127.0.0.1", "--own-name", "hosta"];

    // Nobody has compared: told what there is to compare, and nothing pinned.
    let output = a.remus(&pair).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let of_b = b.fingerprint().await;
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains(&of_b) && said.contains("Nothing was pinned"), "{said}");
    // Another host than the expected one.
    let of_a = a.fingerprint().await;
    let output = a.remus(&[&pair[..], &["--yes", &of_a]].concat()).await;
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("somebody is in between"));
    assert!(a.keyring.peers().is_empty() && b.keyring.peers().is_empty());

    let paired = a.remus_json(&[&pair[..], &["--yes", &of_b]].concat()).await;
    assert_eq!((&paired["reached"], &paired["reached-back"]), (&true.into(), &true.into()), "{paired}");
    assert_eq!(paired["fingerprint"], *of_b);
    let peers = b.remus_json(&["peers"]).await;
    assert_eq!(peers["peers"][0]["name"], "hosta");
    assert_eq!(peers["peers"][0]["address"], "127.0.0.1", "whence ssh came");
    assert_eq!(peers["peers"][0]["fingerprints"], serde_json::json!([of_a]));

    a.remus_json(&["keys", "rotate"]).await;
    let new = a.fingerprint().await;
    assert_ne!(new, of_a);
    assert_eq!(b.remus_json(&["peers"]).await["peers"][0]["fingerprints"], serde_json::json!([new]));

    let text = a.remus(&["peers"]).await;
    assert!(String::from_utf8_lossy(&text.stdout).contains(&of_b));
    a.remus_json(&["unpair", "hostb"]).await;
    assert!(a.keyring.peers().is_empty());
    assert_eq!(a.remus(&["unpair", "hostb"]).await.status.code(), Some(4));
}

#[tokio::test]
async fn without_a_daemon_the_command_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_remus"))
        .arg("--socket")
        .arg(folder.path().join("remusd.sock"))
        .args(["peers"])
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("systemctl status remusd"));
}
