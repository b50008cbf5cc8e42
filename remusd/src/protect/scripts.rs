//! Disks that an operator has given to programs: from the options to what both hosts need to know.
//!
//! The backup learns of them with the guest's configuration: a member that libxl does not know is added for the way, and taken out
//! before anybody else sees it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use devices::script::ScriptedDisk;
use serde_json::Value;

/// The added member of the configuration.
const MEMBER: &str = "remus_disk_scripts";

/// The disks of a domain, by its configuration as libxl writes it, that `scripts` (from vdev names to programs) speaks of.
///
/// # Errors
/// A sentence: the domain has no such disk.
pub fn scripted(config: &str, scripts: &BTreeMap<String, PathBuf>) -> Result<Vec<ScriptedDisk>, String> {
    if scripts.is_empty() {
        return Ok(Vec::new());
    }
    let config: Value = serde_json::from_str(config).map_err(|error| error.to_string())?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let disks = config["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
    let find = |(vdev, program): (&String, &PathBuf)| {
        let found = disks.iter().find(|disk| disk["vdev"] == vdev.as_str()).ok_or_else(|| {
            let known: Vec<_> = disks.iter().filter_map(|disk| disk["vdev"].as_str()).collect();
            format!("--disk {vdev}: the domain has no such disk; it has {}", known.join(", "))
        })?;
        Ok(ScriptedDisk {
            vdev: vdev.clone(),
            program: program.clone(),
            target: text(&found["pdev_path"]),
            domain: text(&config["c_info"]["name"]),
            uuid: text(&config["c_info"]["uuid"]),
        })
    };
    scripts.iter().map(find).collect()
}

/// The configuration with these disks, for the backup. Without any it is left as it is.
///
/// # Errors
/// It is no JSON object.
pub fn add(config: &str, disks: &[ScriptedDisk]) -> Result<String, String> {
    if disks.is_empty() {
        return Ok(config.to_owned());
    }
    let mut json: serde_json::Map<String, Value> = serde_json::from_str(config).map_err(|error| error.to_string())?;
    json.insert(MEMBER.into(), serde_json::to_value(disks).map_err(|error| error.to_string())?);
    serde_json::to_string(&json).map_err(|error| error.to_string())
}

/// Takes out what [`add`] added. The configuration is as it came if there is nothing.
///
/// # Errors
/// What is there is not understood: another version may say something there that matters.
pub fn take(config: &Bytes) -> Result<(Bytes, Vec<ScriptedDisk>), String> {
    let mut json: Value = serde_json::from_slice(config).map_err(|error| error.to_string())?;
    let Some(found) = json.as_object_mut().and_then(|object| object.remove(MEMBER)) else {
        return Ok((config.clone(), Vec::new()));
    };
    let disks = serde_json::from_value(found).map_err(|error| format!("{MEMBER}: {error}"))?;
    Ok((serde_json::to_vec(&json).map_err(|error| error.to_string())?.into(), disks))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str =
        r#"{"c_info":{"name":"web","uuid":"0f"},"disks":[{"vdev":"xvda"},{"vdev":"xvdb","pdev_path":"/dev/vg/b"}]}"#;

    #[test]
    fn what_is_added_for_the_way_is_taken_out_again() {
        let scripts = BTreeMap::from([("xvdb".to_owned(), PathBuf::from("/p"))]);
        let disks = scripted(CONFIG, &scripts).unwrap();
        assert_eq!((disks[0].target.as_str(), disks[0].domain.as_str()), ("/dev/vg/b", "web"));
        let sent = add(CONFIG, &disks).unwrap();
        let (config, found) = take(&sent.into()).unwrap();
        assert_eq!(found, disks);
        let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(parse(&config), parse(CONFIG.as_bytes()));
        assert_eq!(add(CONFIG, &[]).unwrap(), CONFIG, "without any, not a byte is changed");
        assert_eq!(take(&CONFIG.into()), Ok((CONFIG.into(), Vec::new())));
        let odd = CONFIG.replace("\"disks\"", "\"remus_disk_scripts\":[{\"vdev\":\"x\"}],\"disks\"");
        assert!(take(&odd.into()).unwrap_err().contains("remus_disk_scripts"));
    }

    #[test]
    fn a_disk_that_is_not_there_is_named() {
        let scripts = BTreeMap::from([("xvdc".to_owned(), PathBuf::from("/p"))]);
        let error = scripted(CONFIG, &scripts).unwrap_err();
        assert!(error.contains("xvdc") && error.contains("xvda, xvdb"), "{error}");
        assert_eq!(scripted("no json", &BTreeMap::new()), Ok(Vec::new()));
    }
}
