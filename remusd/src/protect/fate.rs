//! What becomes of a domain that has ended: its configuration's word, carried out by us since xl's monitor leaves at the first
//! checkpoint (hazard F24, facts of Xen 4.17: "Domain has suspended." ends the monitor).

use async_trait::async_trait;
use tokio::process::Command;

use super::domain::{DomainConfig, OnEnd};
use super::machine::GuestEnd;
use crate::ids::DomId;

/// The toolstack failed.
#[derive(Debug, thiserror::Error)]
#[error("{what} failed: {text}")]
pub struct ToolstackError {
    /// The command.
    pub what: String,
    /// Its words.
    pub text: String,
}

/// Destroys, keeps and boots domains.
#[async_trait]
pub trait Toolstack: Send + Sync {
    /// Destroys a domain and its devices. Fine when it is gone.
    async fn destroy(&self, domid: DomId) -> Result<(), ToolstackError>;
    /// Dumps a domain's memory to a file that its name tells.
    async fn dump_core(&self, domid: DomId, name: &str) -> Result<(), ToolstackError>;
    /// Renames a domain.
    async fn rename(&self, domid: DomId, name: &str) -> Result<(), ToolstackError>;
    /// Boots a domain from libxl's JSON, unpaused. Returns its id.
    async fn create(&self, json: &str) -> Result<DomId, ToolstackError>;
}

/// xl, and libxl itself for what xl cannot do (booting from libxl's JSON).
#[derive(Clone, Debug, Default)]
pub struct Xl;

async fn run(program: &std::path::Path, args: &[&str], input: Option<&str>) -> Result<String, ToolstackError> {
    use std::process::Stdio;
    use tokio::io::AsyncWriteExt;
    let what = format!("{} {}", program.display(), args.join(" "));
    let fail = |text: String| ToolstackError { what: what.clone(), text };
    let mut child = Command::new(program)
        .args(args)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| fail(e.to_string()))?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        stdin.write_all(input.as_bytes()).await.map_err(|e| fail(e.to_string()))?;
    }
    let output = child.wait_with_output().await.map_err(|e| fail(e.to_string()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(fail(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())))
    }
}

#[async_trait]
impl Toolstack for Xl {
    async fn destroy(&self, domid: DomId) -> Result<(), ToolstackError> {
        match run("xl".as_ref(), &["destroy", &domid.to_string()], None).await {
            Err(e) if e.text.contains("invalid domain identifier") => Ok(()),
            other => other.map(drop),
        }
    }

    async fn dump_core(&self, domid: DomId, name: &str) -> Result<(), ToolstackError> {
        // Where xl's own monitor puts it.
        std::fs::create_dir_all("/var/lib/xen/dump")
            .map_err(|e| ToolstackError { what: "mkdir /var/lib/xen/dump".into(), text: e.to_string() })?;
        run("xl".as_ref(), &["dump-core", &domid.to_string(), &format!("/var/lib/xen/dump/{name}")], None)
            .await
            .map(drop)
    }

    async fn rename(&self, domid: DomId, name: &str) -> Result<(), ToolstackError> {
        run("xl".as_ref(), &["rename", &domid.to_string(), name], None).await.map(drop)
    }

    async fn create(&self, json: &str) -> Result<DomId, ToolstackError> {
        let this = std::env::current_exe()
            .map_err(|e| ToolstackError { what: "finding our own program".into(), text: e.to_string() })?;
        let printed = run(&this, &["create-domain"], Some(json)).await?;
        printed.trim().parse().map(DomId).map_err(|_| ToolstackError {
            what: "remusd create-domain".into(),
            text: format!("it printed {printed:?} instead of a domain id"),
        })
    }
}

/// Does what the configuration says for this end. Returns what was done, in words, and the new domain if there is one.
///
/// # Errors
/// When the toolstack fails; what was done before stays done.
pub async fn apply(
    toolstack: &dyn Toolstack,
    domid: DomId,
    name: &str,
    config: &DomainConfig,
    end: GuestEnd,
) -> Result<(String, Option<DomId>), ToolstackError> {
    if end == GuestEnd::Gone {
        return Ok(("it was destroyed from outside; nothing is left to do".into(), None));
    }
    let mut action = config.on_end(end);
    if matches!(action, OnEnd::CoredumpDestroy | OnEnd::CoredumpRestart) {
        toolstack.dump_core(domid, name).await?;
        action = if action == OnEnd::CoredumpDestroy { OnEnd::Destroy } else { OnEnd::Restart };
    }
    match action {
        OnEnd::Preserve => Ok(("kept, as its configuration says".into(), None)),
        OnEnd::Destroy => {
            toolstack.destroy(domid).await?;
            Ok(("destroyed, as its configuration says".into(), None))
        }
        OnEnd::RenameRestart => {
            toolstack.rename(domid, &format!("{name}-ended-{domid}")).await?;
            let new = toolstack.create(&config.json).await?;
            Ok((format!("renamed and booted anew as domain {new}, unprotected"), Some(new)))
        }
        _ => {
            toolstack.destroy(domid).await?;
            let new = toolstack.create(&config.json).await?;
            Ok((format!("booted anew as domain {new}, unprotected, as its configuration says"), Some(new)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Fake(Mutex<Vec<String>>);

    impl Fake {
        fn note(&self, text: String) {
            self.0.lock().unwrap().push(text);
        }
    }

    #[async_trait]
    impl Toolstack for Fake {
        async fn destroy(&self, domid: DomId) -> Result<(), ToolstackError> {
            self.note(format!("destroy {domid}"));
            Ok(())
        }
        async fn dump_core(&self, domid: DomId, _: &str) -> Result<(), ToolstackError> {
            self.note(format!("dump {domid}"));
            Ok(())
        }
        async fn rename(&self, domid: DomId, name: &str) -> Result<(), ToolstackError> {
            self.note(format!("rename {domid} {name}"));
            Ok(())
        }
        async fn create(&self, _: &str) -> Result<DomId, ToolstackError> {
            self.note("create".into());
            Ok(DomId(9))
        }
    }

    #[tokio::test]
    async fn does_what_the_configuration_says() {
        let rows = [
            ("{}", GuestEnd::Poweroff, vec!["destroy 4"]),
            ("{}", GuestEnd::Reboot, vec!["destroy 4", "create"]),
            (r#"{"on_crash":"coredump_restart"}"#, GuestEnd::Crash, vec!["dump 4", "destroy 4", "create"]),
            (r#"{"on_crash":"preserve"}"#, GuestEnd::Crash, vec![]),
            (r#"{"on_reboot":"rename_restart"}"#, GuestEnd::Reboot, vec!["rename 4 g-ended-4", "create"]),
            ("{}", GuestEnd::Gone, vec![]),
        ];
        for (json, end, wanted) in rows {
            let fake = Fake::default();
            let config = DomainConfig::parse(json.into()).unwrap();
            apply(&fake, DomId(4), "g", &config, end).await.unwrap();
            assert_eq!(*fake.0.lock().unwrap(), wanted, "{json} {end}");
        }
    }
}
